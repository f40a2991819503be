"""A rank whose launcher was killed ends by itself; a process whose shell ended goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import process_environment

from megachiar.launcher_watch import find_launcher
from megachiar.process_identity import ProcessIdentity, command_of, parent_of

pytestmark = [
    pytest.mark.every_python,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc tells who started a process"),
]
RANK = (
    "import sys, time\n"
    "from megachiar.launcher_watch import LauncherWatch\n"
    "watch = LauncherWatch()\n"
    "watch.start()\n"
    "print(len(watch.chain), flush=True)\n"
    "time.sleep(300)\n"
)
STARTER = "import subprocess, sys\nsubprocess.Popen([{python!r}, {rank!r}]).wait()\n"


def start(folder: Path, name: str, wrapper: str = "") -> tuple[subprocess.Popen, ProcessIdentity, int]:
    """Start a program of this name that starts a rank; return the program, the rank, and how many it watches."""
    rank, starter = folder / "rank.py", folder / name
    rank.write_text(RANK)
    starter.write_text(STARTER.format(python=sys.executable, rank=str(rank)))
    command = [sys.executable, str(starter)]
    if wrapper:
        (folder / wrapper).write_text(f"{sys.executable} {starter}; true\n")
        command = ["bash", str(folder / wrapper)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=process_environment())
    watched = int(program.stdout.readline())
    (pid,) = (int(p) for p in os.listdir("/proc") if p.isdigit() and command_of(int(p)).endswith(str(rank)))
    return program, ProcessIdentity.of(pid), watched


def ended(process: ProcessIdentity, within: float) -> bool:
    until = time.monotonic() + within
    while process.runs() and time.monotonic() < until:
        time.sleep(0.05)
    return not process.runs()


@pytest.mark.parametrize(
    ("name", "wrapper", "watched"), [("torchrun", "", 1), ("deepspeed", "", 1), ("a", "mpirun", 2)]
)
def test_a_rank_ends_with_its_launcher(tmp_path, name, wrapper, watched):
    program, rank, found = start(tmp_path, name, wrapper)
    try:
        assert found == watched and rank.runs()
        program.kill()
        assert ended(rank, 30)
        assert f"its launcher (process {program.pid} on" in program.communicate()[0].decode()
    finally:
        if rank.runs():
            os.kill(rank.pid, signal.SIGKILL)
        program.wait()


def test_a_process_whose_starter_is_no_launcher_lives_on(tmp_path):
    program, rank, found = start(tmp_path, "torchrun_notes")
    try:
        assert found == 0
        program.kill()
        program.wait()
        assert not ended(rank, 2.5)
    finally:
        os.kill(rank.pid, signal.SIGKILL)
        program.stdout.close()


@pytest.mark.parametrize(
    ("command", "is_launcher"),
    [
        ("/usr/bin/python3.11 /opt/venv/bin/torchrun --standalone x.py", True),
        ("python -m torch.distributed.run x.py", True),
        ("/opt/venv/bin/python -u -m deepspeed.launcher.launch --world_info=e30= x.py", True),
        ("/opt/venv/bin/python /opt/venv/bin/deepspeed x.py", True),
        ("slurmstepd: [17.0]", True),
        ("/opt/mpich/hydra_pmi_proxy --control-port a:1", True),
        ("/bin/sh /opt/intel/bin/mpirun -n 2 python x.py", True),
        ("/opt/venv/bin/python3 /opt/venv/bin/megachiar sweep mine.yaml", True),
        ("python -u -m megachiar sweep mine.yaml --only a", True),
        ("/usr/bin/python3 tools/sweep.py mine.yaml", True),
        ("python -m megachiar pretrain --config megachiar sweep", False),
        ("vim torchrun.txt", False),
        ("bash -c torchrun x.py &", False),
        ("/usr/bin/python3 -m pytest tests/test_launcher_watch.py", False),
        ("bash", False),
        ("", False),
    ],
)
def test_launchers_are_known_by_what_they_run(monkeypatch, command, is_launcher):
    parent = parent_of(os.getpid())
    monkeypatch.setattr(
        "megachiar.launcher_watch.command_of", lambda pid: command if pid == parent else "something else"
    )
    assert [process.pid for process in find_launcher(os.getpid())] == ([parent] if is_launcher else [])
