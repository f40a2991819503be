"""A block of a dataset that is not what was written ends the run, whether it is found at the start or in mid-run."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, pretrain, run_ranks

from megachiar.activity import Activity
from megachiar.data.sampling.dataset import TokenSource
from megachiar.data.sampling.verification import BackgroundCheck, DataBlock, blocks_of, find_altered
from megachiar.data.storage.files import bin_path, idx_path, manifest_path
from megachiar.errors import UserError
from megachiar.progress import ByteProgress
from megachiar.training.metrics import read_metrics
from megachiar.training.verify_data import share_of_blocks, verify_data

WRITTEN = ROOT / "tests" / "fixtures" / "written_by_0.1.0"  # its datasets have manifests


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A run with its data, in the current folder."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def swap_tokens(prefix: Path, first: int = 0) -> None:
    """Exchange two tokens: every id is still one of the vocabulary, so that nothing else can notice."""
    tokens = np.fromfile(bin_path(prefix), dtype=np.uint16)
    other = first + int(np.flatnonzero(tokens[first:] != tokens[first])[0])
    tokens[first], tokens[other] = tokens[other], tokens[first]
    tokens.tofile(bin_path(prefix))


def test_a_thread_finds_the_block_and_names_its_bytes(folder):
    swap_tokens(folder / "train")
    with BackgroundCheck(blocks_of([TokenSource("train")])) as check:
        check.wait()
    assert "train.bin: bytes 0 to 67,108,863 (or the end) have checksum" in str(check.problem)
    assert "copy it again" in check.problem.remedy


def test_whole_data_and_data_without_checksums_are_no_problem(folder):
    blocks = blocks_of([TokenSource("train"), TokenSource(folder / "train")])
    assert [block.path.suffix for block in blocks] == [".idx", ".bin"]  # each file once
    assert find_altered(blocks) is None
    with BackgroundCheck(blocks) as check:
        check.wait()
    assert check.problem is None
    manifest_path("train").unlink()
    swap_tokens(folder / "train")
    assert blocks_of([TokenSource("train")]) == []
    with BackgroundCheck([]) as check:
        check.wait()
    assert check.problem is None


def raise_alone(error: UserError) -> None:
    raise error


def test_verifying_at_the_start_shows_progress_on_one_rank_and_moves_the_watch_on_all(folder, capsys, monkeypatch):
    monkeypatch.setattr(ByteProgress.__init__, "__defaults__", (None, 0.0))  # a line for each block
    blocks, activity = blocks_of([TokenSource("train")]), Activity()
    assert verify_data(blocks, activity, lambda: False, list, 60, show_progress=True)
    lines = capsys.readouterr().err.splitlines()
    size = sum(path("train").stat().st_size for path in (bin_path, idx_path)) / 1e6
    assert len(lines) == len(blocks) == 2
    assert lines[-1].startswith(f"verifying the data: {size:.1f} MB, ") and "100 %, 0:00:00 left" in lines[-1]
    assert (activity.count, activity.doing) == (2, "verifies the data, block 2 of 2")
    swap_tokens(folder / "train")
    monkeypatch.setattr("megachiar.training.verify_data.raise_together", raise_alone)
    with pytest.raises(UserError, match="have checksum"):
        verify_data(blocks, activity, lambda: False, list, 60, show_progress=False)
    assert capsys.readouterr().err == ""


def test_a_file_that_is_gone_is_one_message(folder):
    blocks = blocks_of([TokenSource("train")])
    bin_path("train").unlink()
    assert "cannot read" in find_altered(blocks).problem


def test_ranks_share_the_blocks_of_one_file_and_read_their_own_copies_whole():
    blocks = [DataBlock(Path(name), number, "") for name in ("a.idx", "a.bin") for number in range(7)]
    shared, of_node_0, of_node_1 = (1, 9), (2, 9), (3, 9)
    identities = [[shared, of_node_0], [shared, of_node_1], [shared, of_node_0], [shared, of_node_1], [(4, 9)]]
    shares = [share_of_blocks(blocks, identities, rank) for rank in range(4)]
    index = [block for share in shares for block in share if block.path.name == "a.idx"]
    assert sorted(index) == sorted(blocks[:7])
    for node in (0, 1):
        read = [block for share in shares[node::2] for block in share if block.path.name == "a.bin"]
        assert sorted(read) == sorted(blocks[7:])


@pytest.mark.parametrize("verify", ("start", "background"))
def test_a_damaged_copy_that_one_rank_alone_reads_is_found_by_it(folder, verify):
    """Ranks begin in folders of their own, as on nodes with local copies. The sampled digests are equal."""
    program = folder / "in_its_folder.py"
    program.write_text(
        "import os\n"
        f"os.chdir(os.path.join({str(folder)!r}, os.environ['RANK']))\n"
        "from megachiar.data.storage import sampled_digest\n"
        "sampled_digest._SAMPLED_BLOCKS = 1\n"
        "sampled_digest._BLOCK_BYTES = 1\n"
        "from megachiar.console import run\n"
        "from megachiar.pretrain import main\n"
        "run(main)\n"
    )
    for rank in range(2):
        (folder / str(rank)).mkdir()
        for path in folder.glob("train.*"):
            shutil.copy(path, folder / str(rank))
    swap_tokens(folder / "1" / "train", first=50)
    sets = [f"data.tokenizer={folder}/tokenizer.model", "parallel.tensor_size=1", f"data.verify={verify}"]
    more = [f"logging.folder={folder}/copies", "training.steps=1000", "checkpoint.every=null"]
    command = [program, "--config", folder / "run.yaml", "--set", "data.train.0.path=train", *sets, *more]
    said = " ".join(" ".join(run_ranks(2, *command, codes=(2,))).split())
    assert f"rank 1 on {os.uname().nodename}: train.bin: bytes 0 to 67,108,863" in said and "Traceback" not in said


def test_a_stop_breaks_a_long_verification_off_and_ranks_ask_one_another_meanwhile(monkeypatch):
    monkeypatch.setattr("megachiar.training.verify_data.ROUND_S", 0.05)
    monkeypatch.setattr(DataBlock, "check", lambda self: time.sleep(0.01))
    blocks, rounds = [DataBlock(Path("a.bin"), number, "") for number in range(10_000)], []

    def reduce_sum(values: list[float]) -> list[float]:
        rounds.append(time.monotonic())
        return values

    assert not verify_data(blocks, Activity(), lambda: len(rounds) >= 3, reduce_sum, 60, show_progress=False)
    assert len(rounds) == 4 and rounds[-1] - rounds[0] < 5
    monkeypatch.setattr("megachiar.training.verify_data.ROUND_S", 1000)
    rounds.clear()  # ranks that wait for 0.2 s alone ask earlier
    assert not verify_data(blocks, Activity(), lambda: len(rounds) >= 3, reduce_sum, 0.2, show_progress=False)
    assert len(rounds) == 4
    told = [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]  # another rank is not done yet
    assert verify_data([], Activity(), lambda: False, lambda _: told.pop(0), 60, show_progress=False)
    assert not told


def test_the_thread_ends_with_the_run(folder):
    many = blocks_of([TokenSource("train")]) * 10_000
    with BackgroundCheck(many) as check:
        pass
    check.wait()
    assert not any(thread.name == "megachiar-data-check" for thread in threading.enumerate())


def test_a_run_on_altered_data_ends_with_one_message_unless_it_is_told_not_to_look(folder):
    swap_tokens(folder / "train")
    sets = [f"data.train.0.path={folder}/train", f"data.tokenizer={folder}/tokenizer.model", "parallel.tensor_size=1"]

    def start(verify: str, *more: str, code: int) -> str:
        new = f"logging.folder={folder}/{verify}"
        return pretrain(folder / "run.yaml", *sets, new, f"data.verify={verify}", *more, codes=(code,))[0]

    message = f"{folder}/train.bin: bytes 0 to 67,108,863"
    output = start("start", code=2)
    assert message in output and "remedy:" in output and "Traceback" not in output
    assert not (folder / "start" / "metrics.jsonl").exists(), "no step was taken"
    output = start("background", "training.steps=1000", code=2)
    assert message in output and "remedy:" in output and "Traceback" not in output
    taken = [record["step"] for record in read_metrics(folder / "background", "train")]
    assert max(taken, default=0) < 500, "it ends long before its last step"
    assert message not in start("never", code=0)


def test_a_block_that_one_of_two_ranks_finds_damaged_ends_both_with_one_message(folder):
    """One rank has the first block of each file."""
    swap_tokens(folder / "train")
    sets = [f"data.train.0.path={folder}/train", f"data.tokenizer={folder}/tokenizer.model", "parallel.tensor_size=1"]
    more = [f"logging.folder={folder}/two", "training.steps=1000", "checkpoint.every=null"]
    outputs = pretrain(folder / "run.yaml", *sets, *more, ranks=2, codes=(2,))
    said = " ".join(" ".join(outputs).split())
    assert said.count("error:") == 1 and said.count("have checksum") == 1, outputs
    assert (
        f"rank 0 on {os.uname().nodename}: {folder}/train.bin: bytes 0 to 67,108,863 (or the end) have checksum" in said
    )
    assert "remedy:" in said and "Traceback" not in said
    assert max((record["step"] for record in read_metrics(folder / "two", "train")), default=0) < 500
    assert not (folder / "two" / "checkpoints").exists(), "nothing is saved after damaged data was read"
