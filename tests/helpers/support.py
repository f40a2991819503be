"""Helpers that many tests share: a small dataset, a small config, and real processes."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from safetensors.torch import load_file

from megachiar.checkpoint.checksums import write_checksummed
from megachiar.checkpoint.format import CONFIG_FILE, STATE_FILE, find_damage, read_state
from megachiar.checkpoint.verify import verify_alone
from megachiar.data.storage.writer import IndexedDatasetBuilder

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
WORKERS = TESTS / "workers"
FORKS = sys.platform == "linux"  # elsewhere a process that has imported torch is better not forked


def write_tokens(prefix: Path, *, documents: int = 24, seed: int = 0, vocab_size: int = 64) -> Path:
    """Write an indexed dataset of so many documents, with a pattern that a model can learn, and return its prefix."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(documents):
            length, start, stride = rng.integers(60, 140), rng.integers(vocab_size), rng.integers(1, 4)
            noise = rng.integers(0, 2, length)
            builder.add_document(((start + stride * np.arange(length) + noise) % vocab_size).astype(np.uint16))
    return prefix


def small_config(folder: Path, **sections: dict) -> dict:
    """Return a config that trains in seconds; each of ``sections`` updates the section of its name."""
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
        "logging": {"folder": str(folder / "run"), "every": 1, "tensorboard": False, "page": False},
    }
    for name, section in sections.items():
        config.setdefault(name, {}).update(section)
    return config


def write_config(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def heed_ctrl_c() -> None:
    """Let a new process end by Ctrl-C (``preexec_fn``): one whose parent was started in the background ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def process_environment(**more: str) -> dict[str, str]:
    """Return this process's environment without what a launcher or an outer test run has left in it.

    ``more`` adds variables or replaces them.
    """
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "PMI_", "OMPI_", "MPI_", "OMP_NUM")
    env = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    return {
        **env,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS / "helpers"), str(WORKERS)]),
        **more,
    }


def run_command(*command: str | Path, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a clean environment, at the top of the repository."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=process_environment(**env),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def python(*arguments: str | Path, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS`` to its end, as ``run_command`` does."""
    return run_command(sys.executable, *arguments, timeout=timeout, **env)


def forked_python(*arguments: str | Path, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Run what ``python`` runs in a forked process, which saves the seconds that importing torch takes."""
    if not FORKS:
        return python(*arguments, timeout=timeout, **env)
    program = [str(argument) for argument in arguments]
    with tempfile.TemporaryFile() as errors:
        process = ForkedRank(program, process_environment(**env), errors.fileno())
        try:
            output, _ = process.communicate(timeout)
        finally:
            process.kill()
        errors.seek(0)
        return subprocess.CompletedProcess(program, process.returncode, output, errors.read().decode())


def checkpoint_tensors(checkpoint: Path) -> dict[str, bytes]:
    """Return the bytes of each tensor of a checkpoint, weights and optimizer state, by file and name.

    The files themselves are not to be compared: safetensors writes the header in any order.
    """
    files = {path.name: load_file(path) for path in sorted(checkpoint.glob("*.safetensors"))}
    assert files, f"{checkpoint} holds no tensors"
    return {f"{file} {name}": value.numpy().tobytes() for file, held in files.items() for name, value in held.items()}


class ForkedRank:
    """A rank that the server of ``rank_server.py`` has forked, with the methods of ``subprocess.Popen`` that tests use.

    Its standard error is written to the descriptor ``errors``, or where its output goes if that is None. It begins when
    the descriptor ``gate`` is at its end, or at once if that is None.
    """

    def __init__(
        self, arguments: Sequence[str], env: dict[str, str], errors: int | None = None, gate: int | None = None
    ):
        self.args = arguments
        self.returncode: int | None = None
        self._read = b""
        self._output, output_of_rank = os.pipe()
        self._status, status_of_rank = os.pipe()
        message = json.dumps({"arguments": arguments, "cwd": str(ROOT), "env": env}).encode()
        errors = output_of_rank if errors is None else errors
        with open(os.devnull) as nothing:
            gate = nothing.fileno() if gate is None else gate
            socket.send_fds(_rank_server(), [message], [output_of_rank, errors, status_of_rank, gate])
        os.close(output_of_rank)
        os.close(status_of_rank)
        self.pid = self._read_number()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = self._read_number()
            os.close(self._status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            self._await(self._status, timeout)
        return self.poll()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        until = None if timeout is None else time.monotonic() + timeout
        left = timeout
        while self._output is not None:
            self._await(self._output, left)
            left = None if until is None else max(0, until - time.monotonic())
            read = os.read(self._output, 2**16)
            self._read += read
            if not read:
                os.close(self._output)
                self._output = None
        self.wait(left)
        return self._read.decode(), None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _await(self, descriptor: int, timeout: float | None) -> None:
        if not select.select([descriptor], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)

    def _read_number(self) -> int:
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._status, 1)
            assert byte, "the server of ranks is gone"
            line += byte
        return int(line)


@functools.cache
def _rank_server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, str(WORKERS / "rank_server.py"), str(theirs.fileno())],
            cwd=ROOT,
            env=process_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    return ours


def rendezvous_port() -> int:
    """Return a free port for the ranks to meet at.

    It is below the ports that the kernel gives to connections: one of those could be taken before the ranks take it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start_ranks(
    world_size: int, *arguments: str | Path, fresh: bool = False
) -> list[subprocess.Popen[str]] | list[ForkedRank]:
    """Start ``python ARGUMENTS`` as ``world_size`` real ranks on this machine, as a launcher would.

    Ranks are forked from one process that has imported what training imports, which saves seconds for each. With
    ``fresh`` each rank is a new interpreter, as a launcher starts it, with its own imports and its own hash seed.
    """
    port, program = str(rendezvous_port()), [str(argument) for argument in arguments]
    ranks = []
    gate, held = os.pipe()  # the first rank may be done before the last one is forked
    for rank in range(world_size):
        env = process_environment(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        if fresh or not FORKS:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            ranks.append(subprocess.Popen([sys.executable, *program], cwd=ROOT, env=env, **pipes))
        else:
            ranks.append(ForkedRank(program, env, gate=gate))
    os.close(gate)
    os.close(held)
    return ranks


def run_ranks(
    world_size: int, *arguments: str | Path, timeout: float = 240, codes: Sequence[int] = (0,), fresh: bool = False
) -> list[str]:
    """Run ranks to their end and return what each printed; the exit code of each must be one of ``codes``."""
    processes = start_ranks(world_size, *arguments, fresh=fresh)
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode in codes, f"exit code {process.returncode}:\n{output}"
    return outputs


def pretrain(
    config: Path, *overrides: str, ranks: int = 1, codes: Sequence[int] = (0,), fresh: bool = False
) -> list[str]:
    """Train ``config`` on so many ``ranks``, and return what each printed."""
    sets = ["--set", *overrides] if overrides else []
    return run_ranks(ranks, "-m", "megachiar.pretrain", "--config", config, *sets, codes=codes, fresh=fresh)


def find_mpirun() -> str | None:
    """Return the path of ``mpirun``, beside this Python or on the PATH; None where it or mpi4py is missing."""
    if importlib.util.find_spec("mpi4py") is None:
        return None
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def replace_in_config(checkpoint: Path, old: str, new: str) -> None:
    """Replace a text in the config.yaml of a checkpoint as if the run had written it so, checksum and seal included."""
    rewrite_config(checkpoint, (checkpoint / CONFIG_FILE).read_text().replace(old, new))


def rewrite_config(checkpoint: Path, text: str) -> None:
    """Give a checkpoint another config.yaml as if the run had written it so, checksum and seal included."""
    state = read_state(checkpoint)
    size, digest = write_checksummed(checkpoint / CONFIG_FILE, text.encode())
    files, checksums = {**state.files, CONFIG_FILE: size}, {**(state.checksums or {}), CONFIG_FILE: digest}
    edited = state.model_copy(update={"files": files, "checksums": checksums})
    (checkpoint / STATE_FILE).write_bytes(edited.to_json())


def damage_of(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, read whole; None if nothing is."""
    return find_damage(checkpoint) or verify_alone(checkpoint)
