"""A process says once why it ends, in one write, so that the lines of ranks that end together stay apart."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

import pytest
from support import process_environment

from megachiar.errors import EXIT_STOPPED

pytestmark = pytest.mark.every_python
TWO_THREADS = (
    "import threading\n"
    "from megachiar.last_words import print_last_words\n"
    "together = threading.Barrier(2)\n"
    "def end(word):\n"
    "    together.wait()\n"
    "    print_last_words(f'{word} is gone\\n    remedy: \\udcff start again')\n"
    "threads = [threading.Thread(target=end, args=[word]) for word in ('rank 1', 'launcher')]\n"
    "[thread.start() for thread in threads], [thread.join() for thread in threads]\n"
)
LOST_LAUNCHER = (
    "import os\n"
    "from megachiar.launcher_watch import LauncherWatch\n"
    "watch = LauncherWatch()\n"
    "watch.lost = lambda: 'process 7 on n1'\n"
    "watch._watch()\n"
)
EARLY_SIGNAL = "import signal\nfrom megachiar.stop_signals import StopSignals\nStopSignals()._handle(signal.SIGTERM)\n"


def writes(program: str) -> list[str]:
    """Return what ``program`` writes to standard error, write by write."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        env = process_environment(PYTHONUNBUFFERED="1", RANK="3")  # as batch scripts often set it
        subprocess.run([sys.executable, "-c", program], stderr=theirs, env=env, timeout=60, check=False)
        ours.setblocking(False)
        found = []
        while True:
            try:
                found.append(ours.recv(2**16).decode())
            except BlockingIOError:
                return found


def test_two_threads_say_one_reason_in_one_write():
    (said,) = writes(TWO_THREADS)
    assert said.count("is gone") == 1 and said.endswith("remedy: \\udcff start again\n")


@pytest.mark.parametrize(
    ("program", "line"),
    [
        (LOST_LAUNCHER, "error: rank 3 stops: its launcher (process 7 on n1) is gone\n"),
        (EARLY_SIGNAL, "stopped by SIGTERM before training\n"),
    ],
)
def test_the_end_of_a_rank_is_one_write(program, line):
    assert writes(program) == [line]


@pytest.mark.parametrize(("program", "code"), [(LOST_LAUNCHER, 1), (EARLY_SIGNAL, EXIT_STOPPED)])
def test_a_process_ends_though_the_pipe_of_its_log_is_full(program, code):
    """Its reader lives and reads no more, so that a write waits without end."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    try:
        done = subprocess.run([sys.executable, "-c", program], stderr=writer, env=process_environment(), timeout=60)
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == code
