"""A forked rank is what a new interpreter is, to those who start it and to itself."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, forked_python, python, run_ranks, start_ranks

pytestmark = pytest.mark.every_python

PROGRAM = """
import atexit, json, os, sys, time
atexit.register(print, "the end", flush=True)
seen = sys.argv, sys.path[0], os.getcwd(), __name__, os.environ.get("RANK"), sorted(os.environ)
print(json.dumps(seen), flush=True)
print("an error", file=sys.stderr)
if sys.argv[1] == "wait":
    time.sleep(100)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def program(tmp_path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("code", [0, 3])
def test_it_sees_and_gives_what_a_new_one_does(program, code):
    forked, new = (start(program, str(code), SOME="where") for start in (forked_python, python))
    assert (forked.returncode, forked.stdout) == (new.returncode, new.stdout) and new.returncode == code
    assert forked.stdout.endswith("the end\n") and str(ROOT) in forked.stdout and '"SOME"' in forked.stdout
    assert forked.stderr.startswith("an error") and new.stderr.startswith("an error")


def test_a_module_is_run_as_python_does():
    assert (
        forked_python("-m", "megachiar.pretrain", "--help").stdout
        == python("-m", "megachiar.pretrain", "--help").stdout
    )


def test_ranks_are_numbered_and_an_unexpected_code_is_told_with_the_output(program):
    outputs = run_ranks(2, program, "0")
    assert [f'"{rank}"' in output for rank, output in enumerate(outputs)] == [True, True]
    with pytest.raises(AssertionError, match=r"exit code 3:\n(?s:.*)an error"):
        run_ranks(1, program, "3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_signal_ends_it_and_is_its_exit_code(program, number, fresh):
    (process,) = start_ranks(1, program, "wait", fresh=fresh)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=1 if fresh else 0.3)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=10) == process.poll() == -number
    assert "the end" not in process.communicate()[0]
    process.kill()  # of one that has ended: nothing


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")
def test_it_has_imported_what_training_imports(tmp_path):
    path = tmp_path / "program.py"
    path.write_text("import sys\nprint('deepspeed' in sys.modules, 'megachiar.training.run' in sys.modules)")
    assert forked_python(path).stdout.startswith("True True")


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")
def test_a_rank_may_end_while_the_end_of_another_is_written(program):
    """The pipe that the end of the first rank is written to is full, so that the server is busy with it for a while."""
    first, second = start_ranks(2, program, "wait")
    filler = os.open(f"/proc/self/fd/{first._status}", os.O_WRONLY | os.O_NONBLOCK)
    written = os.write(filler, bytes(2**20))
    os.close(filler)
    for rank in (first, second):
        process = os.pidfd_open(rank.pid)
        os.kill(rank.pid, signal.SIGKILL)
        select.select([process], [], [])  # until it has ended
        os.close(process)
        time.sleep(0.2)  # the server learns of it
    assert os.read(first._status, written) == bytes(written)
    assert [rank.wait(timeout=30) for rank in (first, second)] == [-signal.SIGKILL, -signal.SIGKILL]
    assert run_ranks(2, program, "0")
