"""Merging: documents as they were, and every mixture that would spoil a dataset refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import indexed_oracle as oracle
import numpy as np
import pytest

from megachiar.data.preprocessing import merge
from megachiar.data.preprocessing.merge import merge_datasets
from megachiar.data.storage.manifest import check_manifest, read_manifest
from megachiar.data.storage.reader import IndexedDataset
from megachiar.errors import UserError

TOOL = Path(__file__).parents[3] / "tools" / "merge_datasets.py"
A = [[[1, 2, 3], [4]], [[5]]]
B = [[[]], [[6, 7], [], [8]]]


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    """Two datasets with manifests."""
    prefixes = [oracle.write(tmp_path / name, documents) for name, documents in (("a", A), ("b", B))]
    for prefix in prefixes:
        oracle.make_manifest(prefix)
    return prefixes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_merged_files_are_those_of_the_documents_in_order(parts, tmp_path):
    merge_datasets(parts, tmp_path / "out" / "c")
    for suffix, expected in zip(("bin", "idx"), oracle.pack([*A, *B], "uint16"), strict=True):
        assert (tmp_path / "out" / f"c.{suffix}").read_bytes() == expected


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_any_cut_into_blocks_gives_the_same_files(tmp_path, monkeypatch, dtype):
    rng = np.random.default_rng(0)
    documents = [oracle.random_documents(rng, dtype, 25) for _ in range(3)]
    parts = [oracle.write(tmp_path / str(i), part, dtype) for i, part in enumerate(documents)]
    for block in (1, 7, 64, 10**6):
        monkeypatch.setattr(merge, "COPY_BLOCK", block)
        copied: list[int] = []
        merge_datasets(parts, tmp_path / "c", overwrite=True, allow_missing_manifest=True, on_bytes=copied.append)
        expected = oracle.pack([*documents[0], *documents[1], *documents[2]], dtype)
        assert ((tmp_path / "c.bin").read_bytes(), (tmp_path / "c.idx").read_bytes()) == expected
        assert sum(copied) == len(expected[0])
    assert not (tmp_path / "c.json").exists()


def test_manifests_are_added_up_and_describe_the_result(parts, tmp_path):
    merged = merge_datasets(parts, tmp_path / "out" / "c")
    assert merged == read_manifest(tmp_path / "out" / "c")
    assert (merged.documents, merged.tokens, merged.words, merged.text_bytes) == (4, 8, 8, 40)
    assert (merged.skipped, merged.largest_token_id, merged.append_eod) == ({"empty": 4}, 8, True)
    assert merged.sources == ["a.txt", "b.txt"]
    assert merged.tokenizer.file == str(tmp_path / "vocab")  # relative to the input's folder, and the output's differs
    check_manifest(tmp_path / "out" / "c", merged, verify=True)


def test_one_dataset_may_be_merged_and_none_not(parts, tmp_path):
    merge_datasets(parts[:1], tmp_path / "c")
    assert IndexedDataset(tmp_path / "c").tokens.tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="nothing to merge"):
        merge_datasets([], tmp_path / "d")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def spoil_tokenizer(a: Path, b: Path) -> None:
    oracle.make_manifest(b, fingerprint="sha256:bb")


def spoil_eod(a: Path, b: Path) -> None:
    oracle.make_manifest(b, append_eod=False)


def spoil_eod_id(a: Path, b: Path) -> None:
    oracle.make_manifest(b, eod_id=7)


def spoil_type(a: Path, b: Path) -> None:
    oracle.write(b, B, "int32")


def spoil_manifest(a: Path, b: Path) -> None:
    Path(f"{b}.json").unlink()


def spoil_counts(a: Path, b: Path) -> None:
    oracle.make_manifest(b, documents=9)


def spoil_bit(a: Path, b: Path) -> None:
    damage(Path(f"{b}.bin"))


def spoil_size(a: Path, b: Path) -> None:
    os.truncate(f"{b}.bin", 5)


SPOILED = {
    "tokenizer": (spoil_tokenizer, r"made with tokenizer vocab \(sha256:bb\)"),
    "end of document": (spoil_eod, "append_eod is False, but True"),
    "end-of-document token": (spoil_eod_id, "documents end with id 7, but with 0 in"),
    "type": (spoil_type, r"b\.idx: holds int32, but .*a\.idx holds uint16"),
    "no manifest": (spoil_manifest, "pass --allow-missing-manifest"),
    "counts": (spoil_counts, "records documents 9, but the files hold 2"),
    "a flipped bit": (spoil_bit, r"b\.bin: bytes 0 to .* but its manifest records"),
    "truncated": (spoil_size, r"b\.bin: 5 bytes, but"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_does_not_fit_is_refused_and_an_older_output_stays(parts, tmp_path, name):
    spoil, problem = SPOILED[name]
    oracle.write(tmp_path / "c", [[[9]]])
    spoil(*parts)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=problem):
        merge_datasets(parts, tmp_path / "c", overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_what_exists_is_kept_unless_told(parts, tmp_path, suffix):
    (tmp_path / f"c.{suffix}").write_text("precious")
    before = contents(tmp_path)
    done = run_tool(*parts, "--output", tmp_path / "c")
    assert done.returncode == 2 and f"c.{suffix}: exists already" in done.stderr and "--overwrite" in done.stderr
    assert contents(tmp_path) == before
    assert run_tool(*parts, "--output", tmp_path / "c", "--overwrite").returncode == 0
    check_manifest(tmp_path / "c", read_manifest(tmp_path / "c"), verify=True)


def test_without_end_of_document_ids_it_does_not_matter_which_they_were(parts, tmp_path):
    for prefix, eod_id in zip(parts, (0, 7), strict=True):
        oracle.make_manifest(prefix, append_eod=False, eod_id=eod_id)
    assert merge_datasets(parts, tmp_path / "c").documents == 4


def test_an_index_that_is_valid_but_not_the_one_recorded_is_refused(parts, tmp_path):
    documents = [[*B[0], B[1][0]], B[1][1:]]  # the same sequences, cut into documents elsewhere
    oracle.write(parts[1], documents)
    with pytest.raises(UserError, match=r"b\.idx: bytes 0 to .* but its manifest records"):
        merge_datasets(parts, tmp_path / "c")


def test_an_input_is_never_overwritten_under_any_name(parts, tmp_path):
    before = contents(tmp_path)
    for suffix in ("bin", "idx"):
        (tmp_path / f"link.{suffix}").symlink_to(f"{parts[0]}.{suffix}")
        os.link(f"{parts[1]}.{suffix}", tmp_path / f"hard.{suffix}")
    for output in (parts[0], tmp_path / "x" / ".." / "b", tmp_path / "link", tmp_path / "hard"):
        with pytest.raises(UserError, match="is the input"):
            merge_datasets(parts, output)
    assert {name: content for name, content in contents(tmp_path).items() if name in before} == before
    with pytest.raises(UserError, match="named twice"):
        merge_datasets([parts[0], parts[1], tmp_path / "." / "a"], tmp_path / "c")


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


def test_the_tool_merges(parts, tmp_path):
    done = run_tool(*parts, "--output", tmp_path / "c")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'c.bin'}: 4 documents, 8 tokens\n"
    assert read_manifest(tmp_path / "c").documents == 4


def test_the_tool_ends_with_one_message_and_code_2(parts, tmp_path):
    spoil_manifest(*parts)
    done = run_tool(*parts, "--output", tmp_path / "c")
    assert done.returncode == 2 and done.stdout == ""
    assert "b.json: there is no manifest" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "c.bin").exists()
    allowed = run_tool(*parts, "--output", tmp_path / "c", "--allow-missing-manifest")
    assert allowed.returncode == 0 and not (tmp_path / "c.json").exists()
