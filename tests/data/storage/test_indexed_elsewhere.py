"""Datasets from elsewhere: what GPT-NeoX's merge tool writes, and files that nobody may write to."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import indexed_oracle as oracle
import numpy as np
import pytest
from text_helpers import numbered_documents, run_tool, train, write_jsonl

from megachiar.data.preprocessing.merge import merge_datasets
from megachiar.data.sampling.dataset import build_training_samples
from megachiar.data.sampling.inspection import summarise
from megachiar.data.storage.reader import IndexedDataset

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 299, 8], [9, 10]]


def neox_merge(prefixes: list[Path], output: Path) -> Path:
    """What GPT-NeoX's tools/datasets/merge_datasets.py makes of uint16 datasets, from its description alone.

    Sizes and tokens follow each other; of the documents only the first start, 0, is written.
    """
    sizes, tokens = [], b""
    for prefix in prefixes:
        index = Path(f"{prefix}.idx").read_bytes()
        (count,) = struct.unpack_from("<Q", index, 18)
        sizes += struct.unpack_from(f"<{count}i", index, 34)
        tokens += Path(f"{prefix}.bin").read_bytes()
    pointers = [2 * sum(sizes[:number]) for number in range(len(sizes))]
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(sizes), 1)
    rows = struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers) + struct.pack("<q", 0)
    Path(f"{output}.idx").write_bytes(header + rows)
    Path(f"{output}.bin").write_bytes(tokens)
    return output


@pytest.fixture
def merged(tmp_path) -> Path:
    parts = [
        oracle.write(tmp_path / name, [[d] for d in part])
        for name, part in (("a", DOCUMENTS[:2]), ("b", DOCUMENTS[2:]))
    ]
    return neox_merge(parts, tmp_path / "merged")


def test_neox_merge_output_is_read_with_a_document_for_each_sequence(merged):
    dataset = IndexedDataset(merged)
    assert not dataset.tells_documents and len(dataset) == dataset.documents == 4
    assert [dataset.document(number).tolist() for number in range(4)] == DOCUMENTS
    assert [dataset.document_of_token(token) for token in range(10)] == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]
    dataset.check_index()
    samples = build_training_samples([(merged, 1.0)], 3, 0)
    assert {int(token) for k in range(3) for token in samples.sample(k)} <= {t for d in DOCUMENTS for t in d}


def test_what_neox_merge_loses_is_said(merged):
    summary = summarise(merged, verify=True)
    assert summary["documents"] == 4 and summary["document_tokens"]["largest"] == 4
    assert any(what.startswith("where documents begin: the index does not say it") for what in summary["not_checked"])
    assert not any("where documents begin" in what for what in summarise(merged.with_name("a"))["not_checked"])


def test_merging_it_once_more_mends_it(merged, tmp_path):
    merge_datasets([merged], tmp_path / "mended", allow_missing_manifest=True)
    mended = IndexedDataset(tmp_path / "mended")
    assert mended.tells_documents and mended.document_starts.tolist() == [0, 1, 2, 3, 4]
    assert Path(f"{merged}.bin").read_bytes() == (tmp_path / "mended.bin").read_bytes()


@pytest.fixture(params=["mount", "permissions"])
def read_only(request, tmp_path) -> Iterator[Path]:
    """A folder with a text, a tokenizer and a dataset with its manifest, which cannot be written to."""
    folder = tmp_path / "folder"
    folder.mkdir()
    model = train(folder, "sentencepiece")
    corpus = write_jsonl(folder / "in.jsonl", numbered_documents(300))
    arguments = ("--input", corpus, "--tokenizer", model, "--append-eod", "--output-prefix", folder / "set")
    done = run_tool("preprocess_data", *arguments, "--workers", 1)
    assert done.returncode == 0, done.stderr
    if request.param == "mount":
        if sys.platform != "linux" or os.geteuid() != 0:
            pytest.skip("only root can mount")
        mount = ["mount", "--bind", "-o", "ro", str(folder), str(folder)]
        if subprocess.run(mount, capture_output=True).returncode != 0:
            pytest.skip("this machine does not let root mount")
        try:
            with pytest.raises(OSError, match="Read-only"):
                (folder / "probe").write_text("")
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
        return
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)


def test_a_dataset_that_cannot_be_written_to_serves(read_only, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in read_only.iterdir()}
    done = run_tool("inspect_dataset", read_only / "set", "--verify")
    assert done.returncode == 0, done.stderr
    samples = build_training_samples([(read_only / "set", 1.0)], 16, 0)
    assert samples.batch(range(4)).shape == (4, 17)
    arguments = ("--input", read_only / "in.jsonl", "--tokenizer", read_only / "tokenizer.model", "--append-eod")
    done = run_tool("preprocess_data", *arguments, "--output-prefix", tmp_path / "again", "--workers", 2)
    assert done.returncode == 0, done.stderr
    merge_datasets([read_only / "set", tmp_path / "again"], tmp_path / "both")
    tokens = IndexedDataset(read_only / "set").tokens
    assert np.array_equal(IndexedDataset(tmp_path / "both").tokens, np.concatenate([tokens, tokens]))
    assert {path.name: path.stat().st_mtime_ns for path in read_only.iterdir()} == before


@pytest.mark.parametrize("read_only", ["mount"], indirect=True)
def test_writing_to_a_read_only_mount_is_one_clear_message(read_only, tmp_path):
    shutil.copy(read_only / "in.jsonl", tmp_path / "in.jsonl")
    arguments = ("--input", tmp_path / "in.jsonl", "--tokenizer", read_only / "tokenizer.model", "--workers", 1)
    done = run_tool("preprocess_data", *arguments, "--output-prefix", read_only / "other")
    assert done.returncode == 2 and "Read-only file system" in done.stderr and "Traceback" not in done.stderr
    assert "write to a folder that is not mounted read-only" in done.stderr
