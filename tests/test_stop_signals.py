"""The first signal lets a run save, a second one ends it, and before the ranks have met each one ends it at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from support import process_environment

from megachiar.stop_signals import SAME_SIGNAL_S, StopSignals

pytestmark = pytest.mark.every_python
SAME_S = 0.5
PROGRAM = f"""
import ctypes, os, signal, sys, time
ignored = sys.argv[2:]
for name in ignored:
    signal.signal(getattr(signal, name), signal.SIG_IGN)
for name in {{"SIGINT", "SIGHUP"}} - set(ignored):  # as a shell in the foreground starts a program
    signal.signal(getattr(signal, name), signal.SIG_DFL)
from megachiar import stop_signals
stop_signals.SAME_SIGNAL_S = {SAME_S}
signals = stop_signals.StopSignals()
signals.install()
if sys.argv[1] == "works":
    signals.remember()
print("ready", flush=True)
if sys.argv[1] == "forks":
    signals.remember()
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    print("child ended by", os.WTERMSIG(os.waitpid(child, 0)[1]), flush=True)
if sys.argv[1] == "kills its children":
    signals.remember()
    ends = set()
    for _ in range(300):
        child = os.fork()
        if child == 0:
            time.sleep(60)
        os.kill(child, signal.SIGTERM)
        ends.add(os.waitpid(child, 0)[1])
    time.sleep(0.2)
    print(ends, flush=True)
libc = ctypes.CDLL(None)
while True:
    libc.poll(None, 0, 50)  # in C, where no handler of Python's runs
    print(signals.reason(), flush=True)
"""


@pytest.fixture
def start():
    started = []

    def start(*arguments: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=process_environment(),
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def reads(process: subprocess.Popen, line: str) -> None:
    """Wait until the process has printed this line; lines before it do not matter, but for 20 s no more than those."""
    lines = [process.stdout.readline().strip()]
    while lines[-1] != line:
        assert lines[-1] and len(lines) < 400, lines
        lines.append(process.stdout.readline().strip())


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("SIGTERM", 75, "stopped by SIGTERM before training"),
        ("SIGUSR1", 75, "stopped by SIGUSR1 before training"),
        ("SIGHUP", 75, "stopped by SIGHUP before training"),
        ("SIGINT", 130, "interrupted"),
    ],
)
def test_while_ranks_meet_every_signal_ends_at_once(start, name, code, said):
    process = start("meets")
    process.send_signal(getattr(signal, name))
    assert process.wait(20) == code
    assert said in process.stderr.read()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_the_first_signal_is_remembered_and_a_second_one_ends(start, name):
    number = getattr(signal, name)
    process = start("works")
    process.send_signal(number)
    reads(process, f"a signal ({name})")
    process.send_signal(signal.SIGTERM)  # as a launcher sends it on
    time.sleep(SAME_S + 0.2)
    reads(process, f"a signal ({name})")
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    errors = process.stderr.read()
    assert f"{name}: the run saves and stops" in errors and f"a second signal ({name})" in errors


def test_a_notice_ahead_ends_nothing(start):
    """Slurm sends SIGUSR1 some time before SIGTERM: the save that is on its way must not be ended by the second."""
    process = start("works")
    process.send_signal(signal.SIGUSR1)
    reads(process, "a signal (SIGUSR1)")
    time.sleep(SAME_S + 0.1)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    time.sleep(SAME_S + 0.1)
    reads(process, "a signal (SIGUSR1)")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_what_was_ignored_stays_ignored(start, name):
    process = start("works", name)
    process.send_signal(getattr(signal, name))
    time.sleep(0.2)
    reads(process, "None")
    process.send_signal(signal.SIGTERM)
    reads(process, "a signal (SIGTERM)")


def test_a_child_is_ended_by_a_signal_that_does_not_count_as_ours(start):
    process = start("forks")
    child = int(process.stdout.readline())
    os.kill(child, signal.SIGTERM)
    reads(process, f"child ended by {int(signal.SIGTERM)}")
    reads(process, "None")


def test_a_child_that_is_killed_at_once_is_ended_too(start):
    """Up to its first own instruction a child has the handlers of its parent, and the pipe that they write to."""
    process = start("kills its children")
    reads(process, str({int(signal.SIGTERM)}))
    reads(process, "None")


def test_stacks_can_be_asked_for_before_there_is_a_run_folder(start):
    process = start("meets")
    process.send_signal(signal.SIGUSR2)
    assert "most recent call first" in process.stderr.readline()
    reads(process, "None")


def test_the_time_that_a_run_was_given_counts_from_its_start(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    signals = StopSignals()
    now += 5
    signals.stop_after(None)
    assert signals.reason() is None
    signals.stop_after(60.0)
    now += 54
    assert signals.reason() is None
    now += 1.5
    assert signals.reason() == "training.stop_after"
    assert SAME_SIGNAL_S < 10
