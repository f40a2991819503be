"""Prepare a process for ``torch.distributed``; this module is imported first, before torch.

Every way to start gives the same environment. Plain ``python``, ``torchrun``, ``deepspeed``, ``srun`` and ``mpirun``
all end in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from megachiar.errors import UserError

_MPI_RANKS = (  # rank, world size, local rank and local size in the MPI implementations
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def prepare_environment() -> None:
    """Set the distributed environment and the warning filters of this process; a second call changes nothing.

    Raises:
        UserError: several MPI ranks were started without mpi4py, or the variables are incomplete or contradict
            each other.
    """
    _quiet()
    if "RANK" not in os.environ:
        os.environ.update(_rank_environment(os.environ))
    os.environ.setdefault("LOCAL_RANK", "0")
    rank, world = _int("RANK"), _int("WORLD_SIZE")
    if not 0 <= rank < world:
        raise UserError("environment", f"RANK is {rank} with WORLD_SIZE {world}", "check how the ranks are started")
    _set_rendezvous(world)
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or str(world)
    os.environ["LOCAL_WORLD_SIZE"] = local
    # DeepSpeed reads this and would ask for mpi4py where its own launcher did not start the process.
    os.environ.setdefault("LOCAL_SIZE", local)


def _set_rendezvous(world: int) -> None:
    """Check the address of the rendezvous; a single rank may use any port."""
    if world == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            "environment",
            f"RANK is set, but {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not",
            "start through a launcher, unset RANK to train alone, or export both: the host and a free port of rank 0",
        )
    _int("MASTER_PORT")


def refuse_shared_pipe(config: Path) -> None:
    """Refuse a config that several ranks would read from one pipe, since each of them would get a part of it.

    Raises:
        UserError: ``config`` is standard input or a pipe, and the run has more than one rank.
    """
    if _int("WORLD_SIZE") > 1 and (str(config) == "-" or config.is_fifo()):
        raise UserError(config, "is a pipe, and several ranks cannot read one", "write the config to a file")


def configure_torch(threads: int | None) -> None:
    """Set the CPU threads of this rank, and on a CPU the C allocator.

    Args:
        threads: of this rank; None shares the cores out among the local ranks, unless OMP_NUM_THREADS is set.
    """
    import torch

    if not torch.cuda.is_available():
        keep_freed_memory()
    quiet_deepspeed()
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, _usable_cores() // _int("LOCAL_WORLD_SIZE"))
    if threads is not None:
        torch.set_num_threads(threads)


def _usable_cores() -> int:
    """Return the cores that this process may use, fewer than the machine's in a container or a Slurm job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet_deepspeed() -> None:
    """Keep DeepSpeed from printing on start-up and from warning that there is no GPU; call it before the import."""
    import torch

    _quiet()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks, since page faults of large tensors cost a third of a training step on a CPU."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 2**28)


def drop_launcher_arguments(arguments: Sequence[str]) -> list[str]:
    """Return ``arguments`` without the DeepSpeed launcher's ``--local_rank=N``, which is in the environment too."""
    return [a for a in arguments if not a.startswith(("--local_rank=", "--local-rank="))]


def _rank_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Return RANK and the others from Slurm or MPI, or those of a world of one where neither started this process."""
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _slurm(env)
    for names in _MPI_RANKS:
        if names[0] in env and int(env.get(names[1], "1")) > 1:
            return _mpi()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any port serves a single rank


def _slurm(env: Mapping[str, str]) -> dict[str, str]:
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise UserError(
            "environment",
            f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks but MASTER_ADDR or MASTER_PORT is not set",
            "start through slurm/pretrain_400m.sh, or export both: the first host of the node list, a free port",
        )
    tasks_here = env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"])
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_on_node(tasks_here, int(env.get("SLURM_NODEID", "0")))),
    }


def _tasks_on_node(spec: str, node: int) -> int:
    """Return the tasks on a node from Slurm's compressed form, such as ``4(x2),3``."""
    counts: list[int] = []
    for part in spec.split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[min(node, len(counts) - 1)]


def _mpi() -> dict[str, str]:
    """Return the ranks that MPI gives; rank 0 broadcasts its host name and a free port."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError(
            "mpirun",
            "needs the package mpi4py to find the other ranks",
            "pip install 'megachiar[mpi]', or use torchrun",
        ) from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = node.size == world.size
    address = "127.0.0.1" if one_host else socket.gethostname()
    address, port = world.bcast((address, free_port()) if world.rank == 0 else None)
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(node.rank),
        "LOCAL_WORLD_SIZE": str(node.size),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", address),
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
    }


def free_port() -> int:
    """Return a port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _quiet() -> None:
    """Drop the warnings that DeepSpeed and torch repeat on every rank and step, since a user cannot act on them."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch\.distributed|deepspeed).*")
    os.environ.setdefault("DS_ACCELERATOR_LOG", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "deepspeed" not in sys.modules:
        import logging

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def _int(name: str) -> int:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        raise UserError(
            "environment",
            f"{name} is {os.environ.get(name)!r}, not a number",
            "start through a launcher, or unset RANK",
        ) from None
