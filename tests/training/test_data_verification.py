"""A block of a dataset that is not what was written ends the run, whether it is found at the start or in mid-run."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
from support import ROOT, pretrain

from megachiar.activity import Activity
from megachiar.config import load_config
from megachiar.data.sampling.dataset import TokenSource
from megachiar.data.sampling.verification import BackgroundCheck, blocks_of, find_altered
from megachiar.data.storage import files
from megachiar.data.storage.files import bin_path, idx_path, manifest_path
from megachiar.data.storage.manifest import read_manifest
from megachiar.progress import ByteProgress
from megachiar.topology import TensorParallelGroup, Topology
from megachiar.training.metrics import read_metrics
from megachiar.training.run import data_to_check, verify_data
from megachiar.training.run_data import open_data

WRITTEN = ROOT / "tests" / "fixtures" / "written_by_0.1.0"  # its datasets have manifests


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A run with its data, in the current folder."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def swap_tokens(prefix: Path) -> None:
    """Exchange two tokens: every id is still one of the vocabulary, so that nothing else can notice."""
    path = bin_path(prefix)
    content = bytearray(path.read_bytes())
    size = 2
    tokens = [bytes(content[i : i + size]) for i in range(0, len(content), size)]
    other = next(i for i, token in enumerate(tokens) if token != tokens[0])
    content[:size], content[other * size : (other + 1) * size] = tokens[other], tokens[0]
    path.write_bytes(content)


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


def test_verifying_at_the_start_shows_progress_on_one_rank_and_moves_the_watch_on_all(folder, capsys, monkeypatch):
    monkeypatch.setattr(ByteProgress.__init__, "__defaults__", (None, 0.0))  # a line for each block
    blocks, activity = blocks_of([TokenSource("train")]), Activity()
    assert verify_data(blocks, activity, show_progress=True) is None
    lines = capsys.readouterr().err.splitlines()
    size = sum(path("train").stat().st_size for path in (bin_path, idx_path)) / 1e6
    assert len(lines) == len(blocks) == 2
    assert lines[-1].startswith(f"verifying the data: {size:.1f} MB, ") and "100 %, 0:00:00 left" in lines[-1]
    assert (activity.count, activity.doing) == (2, "verifies the data, block 2 of 2")
    swap_tokens(folder / "train")
    assert "have checksum" in verify_data(blocks, activity, show_progress=False).problem
    assert capsys.readouterr().err == ""


def test_a_file_that_is_gone_is_one_message(folder):
    blocks = blocks_of([TokenSource("train")])
    bin_path("train").unlink()
    assert "cannot read" in find_altered(blocks).problem


def test_data_ranks_share_the_blocks_and_each_is_read_once(folder, monkeypatch):
    monkeypatch.setattr(files, "CHECKSUM_BLOCK", 1000)
    config = load_config("run.yaml")
    data = open_data(config)
    bin_checksums = files.block_checksums(bin_path("train"))
    manifest = read_manifest("train")
    object.__setattr__(manifest.checksums, "bin", bin_checksums)
    for source in data.sources:
        source.manifest = manifest
    assert len(blocks_of(data.sources)) > 8
    shares = []
    for data_rank in range(3):
        for tensor_rank in range(2):
            tensor = TensorParallelGroup(tensor_rank, 2)
            place = Topology(2 * data_rank + tensor_rank, 6, 0, data_rank=data_rank, data_size=3, tensor=tensor)
            share = data_to_check(config, data, place)
            assert bool(share) == (tensor_rank == 0)
            shares += share
    assert sorted(shares) == sorted(blocks_of(data.sources))


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
    """Rank 1 has the block: .idx and .bin alternate over the ranks."""
    swap_tokens(folder / "train")
    sets = [f"data.train.0.path={folder}/train", f"data.tokenizer={folder}/tokenizer.model", "parallel.tensor_size=1"]
    more = [f"logging.folder={folder}/two", "training.steps=1000", "checkpoint.every=null"]
    outputs = pretrain(folder / "run.yaml", *sets, *more, ranks=2, codes=(2,))
    said = " ".join(" ".join(outputs).split())
    assert said.count("error:") == 1 and said.count("have checksum") == 1, outputs
    assert (
        f"rank 1 on {os.uname().nodename}: {folder}/train.bin: bytes 0 to 67,108,863 (or the end) have checksum" in said
    )
    assert "remedy:" in said and "Traceback" not in said
    assert max((record["step"] for record in read_metrics(folder / "two", "train")), default=0) < 500
    assert not (folder / "two" / "checkpoints").exists(), "nothing is saved after damaged data was read"
