"""What several tests need: a small dataset, a small config, and real processes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from megachiar.data.indexed import IndexedDatasetBuilder
from megachiar.launch import free_port

ROOT = Path(__file__).parents[1]


def write_tokens(prefix: Path, *, documents: int = 24, seed: int = 0, vocab_size: int = 64) -> Path:
    """An indexed dataset of ``documents`` documents with a pattern in it that a model can learn."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(documents):
            length, start, stride = rng.integers(60, 140), rng.integers(vocab_size), rng.integers(1, 4)
            noise = rng.integers(0, 2, length)
            builder.add_document(((start + stride * np.arange(length) + noise) % vocab_size).astype(np.uint16))
    return prefix


def small_config(folder: Path, **sections: dict) -> dict:
    """A config that trains in seconds; ``sections`` update its sections."""
    config = {
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "max_sequence_length": 32,
            "router": {"tau": 0.79},
        },
        "data": {"train": [{"path": str(folder / "train")}], "validation": {"valid": str(folder / "valid")}},
        "parallel": {"zero_stage": 1},
        "optimizer": {"learning_rate": 2e-3},
        "schedule": {"warmup_steps": 4},
        "training": {"steps": 20, "global_batch_size": 8, "micro_batch_size": 2, "threads": 1},
        "logging": {"folder": str(folder / "run"), "every": 1, "tensorboard": False},
    }
    for name, section in sections.items():
        config.setdefault(name, {}).update(section)
    return config


def write_config(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def process_environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher or an outer test left in it."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "PMI_", "OMPI_", "MPI_", "OMP_NUM")
    env = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    return {**env, "OMP_NUM_THREADS": "1", **more}


def run_command(*command: str | Path, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a clean environment."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=process_environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python(*arguments: str | Path, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    return run_command(sys.executable, *arguments, timeout=timeout, **env)


def start_ranks(
    world_size: int, *arguments: str | Path, stdout: int | None = subprocess.PIPE
) -> list[subprocess.Popen[str]]:
    """Start ``python ARGUMENTS`` as ``world_size`` real ranks on this machine, as a launcher would."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=process_environment(
                RANK=str(rank),
                WORLD_SIZE=str(world_size),
                LOCAL_RANK=str(rank),
                LOCAL_WORLD_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def run_ranks(world_size: int, *arguments: str | Path, timeout: float = 240, codes: Sequence[int] = (0,)) -> list[str]:
    """Run ranks to their end and return what each printed; fails unless every exit code is one of ``codes``."""
    processes = start_ranks(world_size, *arguments)
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode in codes, f"exit code {process.returncode}:\n{output}"
    return outputs


def pretrain(config: Path, *overrides: str, ranks: int = 1, codes: Sequence[int] = (0,)) -> list[str]:
    """Train ``config`` with ``ranks`` processes; returns what they printed."""
    sets = ["--set", *overrides] if overrides else []
    return run_ranks(ranks, "-m", "megachiar.pretrain", "--config", config, *sets, codes=codes)


def find_mpirun() -> str | None:
    """The ``mpirun`` beside this Python or on the path; None without it or mpi4py."""
    if importlib.util.find_spec("mpi4py") is None:
        return None
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")
