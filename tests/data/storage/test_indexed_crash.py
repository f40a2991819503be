"""A killed writer, a full disk and a second writer: nothing that looks whole, nothing half-written."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megachiar.data.storage import writer
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import UserError

WRITER = """
import sys
import numpy as np
from megachiar.data.storage.writer import IndexedDatasetBuilder
print("begun", flush=True)
while True:
    with IndexedDatasetBuilder(sys.argv[1], "uint16") as builder:
        for number in range(int(sys.argv[2])):
            builder.add_documents(np.full(20_000, number, np.uint16), np.full(5_000, 4))
    print("written", flush=True)
"""


def start_writer(prefix: Path, blocks: int) -> subprocess.Popen:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(prefix), str(blocks)], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert writer.stdout is not None and writer.stdout.readline() == "begun\n"
    return writer


def kill(writer: subprocess.Popen) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert writer.stdout is not None
    writer.stdout.close()


def test_a_killed_writer_leaves_nothing_that_opens_and_the_next_run_replaces_it(tmp_path):
    prefix = tmp_path / "a"
    writer = start_writer(prefix, 10**6)
    temporary = tmp_path / "a.bin.tmp"
    while not (temporary.exists() and temporary.stat().st_size > 1_000_000):
        time.sleep(0.01)
    kill(writer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin.tmp", "a.idx.tmp", "a.starts.tmp"]
    for name in (prefix, tmp_path / "a.bin", tmp_path / "a.bin.tmp"):
        with pytest.raises(UserError, match="does not exist"):
            IndexedDataset(name)

    with IndexedDatasetBuilder(prefix, "uint16") as builder:
        builder.add_document([1, 2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert IndexedDataset(prefix).tokens.tolist() == [1, 2]


def test_a_writer_killed_at_any_moment_leaves_a_whole_dataset_or_none(tmp_path):
    """The writer replaces its dataset over and over; a mixture of two runs or a part of one must never open."""
    pause = random.Random(0)
    opened = 0
    for _ in range(12):
        writer = start_writer(tmp_path / "a", 3)
        assert writer.stdout is not None and writer.stdout.readline() == "written\n"
        time.sleep(pause.uniform(0, 0.05))
        kill(writer)
        try:
            dataset = IndexedDataset(tmp_path / "a")
        except UserError as error:
            assert "does not exist" in str(error)
            continue
        opened += 1
        assert dataset.documents == 15_000
        assert np.array_equal(dataset.tokens, np.repeat(np.arange(3), 20_000))
    assert opened > 0


def test_no_moment_joins_the_tokens_of_one_dataset_with_the_index_of_another(tmp_path, monkeypatch):
    """Stopped between the two renames, over a dataset of the same sizes: the old index must not open the new tokens."""
    prefix = tmp_path / "a"
    with IndexedDatasetBuilder(prefix, "uint16") as builder:
        builder.add_documents([1, 2, 3], [1, 2])
    real = os.replace

    def stop_before_index(source: Path, target: Path) -> None:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(writer.os, "replace", stop_before_index)
    with pytest.raises(KeyboardInterrupt), IndexedDatasetBuilder(prefix, "uint16") as builder:
        builder.add_documents([7, 8, 9], [2, 1])
    with pytest.raises(UserError, match=r"a\.idx: the file does not exist"):
        IndexedDataset(prefix)


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk; the file size limit below is tested for everyone")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with (
            pytest.raises(UserError, match="No space left on device") as refused,
            IndexedDatasetBuilder(tmp_path / "a", "uint16") as builder,
        ):
            for _ in range(100):
                builder.add_document(np.ones(10_000, np.uint16))
        assert str(tmp_path) in refused.value.where and "free some space" in refused.value.remedy
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    ("limit", "when"),
    [(200_000, "while tokens are written"), (1_020_000, "while the index is completed")],
)
def test_a_file_size_limit_is_one_error_and_leaves_nothing(tmp_path, limit, when):
    """A limit per process stands for a full disk or quota wherever no small disk can be mounted."""
    script = (
        "import sys, numpy as np; from megachiar.console import run\n"
        "from megachiar.data.storage.writer import IndexedDatasetBuilder\n"
        "def main():\n"
        "    with IndexedDatasetBuilder(sys.argv[1], 'uint8') as builder:\n"
        "        for _ in range(100): builder.add_documents(np.ones(10_000, np.uint8), np.full(1_000, 10))\n"
        "run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused_and_does_no_harm(tmp_path):
    with IndexedDatasetBuilder(tmp_path / "a", "uint16") as first:
        first.add_document([1, 2, 3])
        with pytest.raises(UserError, match="another process is writing"):
            IndexedDatasetBuilder(tmp_path / "a", "uint16")
        first.add_document([4])
    assert IndexedDataset(tmp_path / "a").tokens.tolist() == [1, 2, 3, 4]


def test_a_writer_that_opened_its_file_before_the_other_finished_does_not_empty_the_result(tmp_path, monkeypatch):
    first = IndexedDatasetBuilder(tmp_path / "a", "uint16")
    first.add_document([1, 2, 3])
    real = writer.fcntl.flock

    def finish_then_lock(*arguments: object) -> None:
        monkeypatch.setattr(writer.fcntl, "flock", real)
        first.finish()
        real(*arguments)

    monkeypatch.setattr(writer.fcntl, "flock", finish_then_lock)
    second = IndexedDatasetBuilder(tmp_path / "a", "uint16")
    assert IndexedDataset(tmp_path / "a").tokens.tolist() == [1, 2, 3]
    second.add_document([9])
    second.finish()
    assert IndexedDataset(tmp_path / "a").tokens.tolist() == [9]


def test_a_file_where_a_folder_is_needed_and_the_reverse_are_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: cannot write: File exists"):
        IndexedDatasetBuilder(tmp_path / "file" / "a", "uint16")
    (tmp_path / "b.bin").mkdir()
    with (
        pytest.raises(UserError, match=r"b\.bin\.tmp: cannot write: Is a directory"),
        IndexedDatasetBuilder(tmp_path / "b", "uint16") as builder,
    ):
        builder.add_document([1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.bin", "file"]
