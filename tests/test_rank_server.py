"""A forked rank is what a new interpreter is, to those who start it and to itself."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, forked_python, python, run_ranks, start_ranks

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
    path.write_text("import sys\nprint('deepspeed' in sys.modules, 'megachiar.training.setup' in sys.modules)")
    assert forked_python(path).stdout.startswith("True True")
