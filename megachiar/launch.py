"""What a process needs before ``torch.distributed`` starts: import this first, before torch.

One environment serves every way to start: plain ``python``, ``torchrun``, ``deepspeed``, ``srun`` and ``mpirun`` all
end in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import sys
import warnings
from collections.abc import Mapping, Sequence

from megachiar.errors import UserError

EXIT_STOPPED = 75
"""Exit code after a signal made the run save and stop: EX_TEMPFAIL, "start me again"."""

_MPI_RANKS = (  # (rank, world size, local rank, local size) of the MPI implementations
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


class StopSignals:
    """Remembers that SIGTERM or SIGUSR1 arrived, so that the loop can save and stop at the end of a step."""

    def __init__(self) -> None:
        self.received: str | None = None

    def install(self) -> None:
        """Catch the signals. Called before torch is imported: an uncaught SIGUSR1 in these seconds ends the rank."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def ignore(self) -> None:
        """Ignore further signals, for the teardown after a save."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number).name


def prepare_environment() -> None:
    """Set the distributed environment of this process, thread counts and warning filters. Idempotent.

    Raises:
        UserError: started by several MPI ranks without mpi4py, or with contradictory ranks.
    """
    _quiet()
    if "RANK" not in os.environ:
        os.environ.update(_rank_environment(os.environ))
    os.environ.setdefault("LOCAL_RANK", "0")
    rank, world = _int("RANK"), _int("WORLD_SIZE")
    if not 0 <= rank < world:
        raise UserError("environment", f"RANK is {rank} with WORLD_SIZE {world}", "check how the ranks are started")
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or str(world)
    os.environ["LOCAL_WORLD_SIZE"] = local
    # DeepSpeed looks for these and would ask for mpi4py where its own launcher did not start the process.
    os.environ.setdefault("LOCAL_SIZE", local)


def configure_torch(threads: int | None) -> None:
    """Set what only torch can: CPU threads of this rank and the C allocator."""
    import torch

    if not torch.cuda.is_available():
        keep_freed_memory()
    quiet_deepspeed()
    if threads is None and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, _usable_cores() // _int("LOCAL_WORLD_SIZE"))
    if threads is not None:
        torch.set_num_threads(threads)


def _usable_cores() -> int:
    """Cores this process may run on: fewer than the machine has inside a container or a Slurm job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet_deepspeed() -> None:
    """Before DeepSpeed is imported: no lines of its own on start-up, nor a warning that there is no GPU."""
    import torch

    _quiet()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks: page faults of big tensors cost a third of a training step on CPU."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 2**28)


def drop_launcher_arguments(arguments: Sequence[str]) -> list[str]:
    """``arguments`` without the ``--local_rank=N`` that the DeepSpeed launcher adds (the environment has it too)."""
    return [a for a in arguments if not a.startswith(("--local_rank=", "--local-rank="))]


def _rank_environment(env: Mapping[str, str]) -> dict[str, str]:
    """RANK and the others from Slurm or MPI; a world of one where neither started us."""
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _slurm(env)
    for names in _MPI_RANKS:
        if names[0] in env and int(env.get(names[1], "1")) > 1:
            return _mpi()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any: nobody else is to find it


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
    """Tasks on node ``node`` from Slurm's compressed form, such as ``4(x2),3``."""
    counts: list[int] = []
    for part in spec.split(","):
        count, _, repeat = part.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[min(node, len(counts) - 1)]


def _mpi() -> dict[str, str]:
    """Ranks from MPI itself; rank 0's host name and a free port of it go to all."""
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _quiet() -> None:
    """Drop the warnings that DeepSpeed and torch repeat on every rank and step and that nobody here can act on."""
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
