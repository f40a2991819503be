"""Say which folders make the package; all else that an installer asks for stands in ``pyproject.toml``.

The package must be installed, not only checked out (``pip install -c constraints.txt -e .``): ``deepspeed
megachiar/pretrain.py`` puts ``megachiar/`` on ``sys.path``, not the folder above it. A wheel holds ``configs/`` as
``megachiar/configs/``.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["megachiar", "megachiar.*"]), "megachiar.configs"],
    package_dir={"megachiar.configs": "configs"},
    package_data={
        "megachiar": ["py.typed"],
        "megachiar.configs": ["*.yaml", "*/*.yaml", "schema.json"],
        "megachiar.monitoring": ["*.html", "*.css", "*.js"],
        "megachiar.reporting": ["*.css"],
        "megachiar.viewer": ["*.html", "*.css", "*.js"],
    },
)
