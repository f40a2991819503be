"""Install megachiar: ``pip install -c constraints.txt -e .``

The package must be installed, not only checked out: ``deepspeed megachiar/pretrain.py`` puts ``megachiar/`` on
``sys.path``, not the folder above it.
"""

from setuptools import find_packages, setup

setup(
    name="megachiar",
    version="0.1.0",
    description="Distributed pretraining for CHIAR-Former language models",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["megachiar", "megachiar.*"]),
    install_requires=[
        "torch>=2.6,<3",
        "deepspeed>=0.19,<0.21",
        "numpy>=1.26",
        "pydantic>=2.8",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "tokenizers>=0.20",
        "zstandard>=0.22",
        "pyarrow>=15",
    ],
    extras_require={
        # Faster where installed, never needed. NVIDIA's apex is built from its own source tree: the package called
        # "apex" on the index is another project and is not listed here on purpose.
        "gpu": ["triton>=3", "nvidia-ml-py>=12"],
        "fast": ["gigatoken>=0.10"],
        "megatron": ["numba>=0.60"],
        "mpi": ["mpi4py>=4"],
        "remote": ["fsspec>=2024.2"],
        "hf": ["datasets>=3", "transformers>=4.44"],
        # The site of docs/, built on Python 3.11 or newer: the tools need it.
        "docs": [
            'sphinx>=9; python_version >= "3.11"',
            'myst-parser>=5; python_version >= "3.11"',
            'furo>=2025.12; python_version >= "3.11"',
        ],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "scipy>=1.11",
            "numba>=0.60",
            'gigatoken>=0.10; platform_machine == "x86_64"',
            "ruff>=0.6",
            'triton>=3; sys_platform == "linux"',
        ],
    },
)
