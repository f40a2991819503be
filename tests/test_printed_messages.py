"""Before ranks meet, an error is printed by whichever rank has it, and once where several have the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import process_environment

from megachiar import printed_messages
from megachiar.printed_messages import notes_path, print_once, seconds_since_boot

pytestmark = [
    pytest.mark.every_python,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc tells when a process started"),
]
RANK = (
    "import sys\n"
    "from megachiar.console import run\n"
    "from megachiar.errors import UserError\n"
    "def fail():\n"
    "    sys.stdin.read()\n"
    "    raise UserError(sys.argv[1], 'is wrong', 'mend it')\n"
    "run(fail)\n"
)
RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LAUNCHERS = {
    "torchrun": lambda r, n: {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(n), **RENDEZVOUS},
    "MPICH": lambda r, n: {"PMI_RANK": str(r), "PMI_SIZE": str(n)},
    "Open MPI": lambda r, n: {"OMPI_COMM_WORLD_RANK": str(r), "OMPI_COMM_WORLD_SIZE": str(n)},
    "srun": lambda r, n: {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(r),
        "SLURM_STEP_NUM_TASKS": str(n),
    },
}


def start(launcher: str, folder: Path, *problems: str) -> list[str]:
    """Run ranks that meet these problems, an empty one for a rank that works, and return what each printed."""
    ranks = []
    for rank, problem in enumerate(problems):
        env = process_environment(TMPDIR=str(folder), **LAUNCHERS[launcher](rank, len(problems)))
        program = [sys.executable, "-c", RANK, problem] if problem else [sys.executable, "-c", "input()"]
        ranks.append(subprocess.Popen(program, env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [rank.communicate("go on\n", timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2 if problem else 0 for problem in problems], outputs
    return outputs


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_rank_alone_prints_its_error_and_several_print_one(tmp_path, launcher):
    """The second start follows at once, and nothing that the first one left keeps its message back."""
    for _ in range(2):
        outputs = start(launcher, tmp_path, "", "a.yaml", "a.yaml")
        assert outputs[0] == "" and sum(output.count("error:") for output in outputs) == 1, outputs
    outputs = start(launcher, tmp_path, "", "a.yaml")
    assert "a.yaml: is wrong" in outputs[1] and "mend it" in outputs[1]
    assert [output.count("error:") for output in start(launcher, tmp_path, "a.yaml", "b.yaml")] == [1, 1]


def shown(message: str = "m", launch: str = "s", since: float | None = 0.0) -> int:
    calls: list[str] = []
    print_once(message, launch, since, lambda: calls.append(message))
    return len(calls)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(printed_messages.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_message_is_told_apart_by_text_start_and_time(folder):
    assert (shown(), shown(), shown("other"), shown(launch="other")) == (1, 0, 1, 1)
    assert shown(since=seconds_since_boot()) == 1, "the notes are older than the process"
    assert shown(since=None) == 1


def test_a_process_that_ends_before_it_printed_keeps_no_message_back(folder):
    with pytest.raises(BrokenPipeError):
        print_once("m", "s", 0.0, lambda: (_ for _ in ()).throw(BrokenPipeError()))
    assert shown() == 1


@pytest.mark.parametrize("what", ["folder", "link", "fifo", "locked", "garbage", "no folder"])
def test_notes_that_cannot_be_used_keep_no_message_back(folder, monkeypatch, what):
    monkeypatch.setattr(printed_messages, "SECONDS_FOR_THE_LOCK", 0.1)
    if what == "folder":
        notes_path().mkdir()
    elif what == "link":
        notes_path().symlink_to(folder / "target")
    elif what == "fifo":
        os.mkfifo(notes_path())
    elif what == "garbage":
        notes_path().write_bytes(b"\xff\x00 1\n\nx y z\n")
    elif what == "no folder":
        monkeypatch.setattr(printed_messages.tempfile, "tempdir", str(folder / "gone"))
    if what == "locked":
        with printed_messages._locked_notes() as held:
            assert held is not None and shown() == 1
    else:
        assert shown() == 1
    assert not (folder / "target").exists()


def test_old_notes_are_dropped(folder, monkeypatch):
    assert shown() == 1
    monkeypatch.setattr(printed_messages, "SECONDS_KEPT", -1.0)
    assert shown("other") == 1
    assert len(notes_path().read_text().splitlines()) == 1
