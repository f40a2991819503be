"""The manifest: written whole, read strictly, and compared with the files beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import indexed_oracle as oracle
import numpy as np
import pytest

from megachiar.data.sampling.dataset import TokenSource
from megachiar.data.storage.files import manifest_path
from megachiar.data.storage.manifest import (
    Checksums,
    check_manifest,
    check_vocabulary,
    read_manifest,
    write_manifest,
)
from megachiar.errors import UserError

pytestmark = pytest.mark.every_python


@pytest.fixture
def prefix(tmp_path) -> Path:
    return oracle.write(tmp_path / "a", [[[1, 2, 3]], [[4, 299]]])


def test_a_manifest_comes_back_as_it_was_written(prefix):
    manifest = oracle.make_manifest(prefix, file="wörter.model")
    assert read_manifest(prefix) == manifest
    assert json.loads(Path(f"{prefix}.json").read_text())["tokenizer"]["file"] == "wörter.model"
    assert sorted(path.suffix for path in prefix.parent.iterdir()) == [".bin", ".idx", ".json"]
    check_manifest(prefix, manifest, verify=True)


def test_no_manifest_is_none(prefix):
    assert read_manifest(prefix) is None


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "file: "),
        ("{", "file: "),
        ("{}", "tokenizer: Field required"),
        ('{"format_version": 1}', "format_version: Input should be 2"),
        ('{"surprise": 1}', "surprise: Unexpected keyword argument"),
    ],
)
def test_what_is_no_manifest_is_refused(prefix, content, named):
    Path(f"{prefix}.json").write_text(content)
    with pytest.raises(UserError) as refused:
        read_manifest(prefix)
    assert refused.value.where == f"{prefix}.json" and named in refused.value.problem


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"documents": 3}, "records documents 3, but the files hold 2"),
        ({"tokens": 6}, "records tokens 6, but the files hold 5"),
        ({"dtype": "int16"}, "records dtype int16, but the files hold uint16"),
    ],
)
def test_counts_that_differ_from_the_files_are_refused_always(prefix, change, problem):
    manifest = oracle.make_manifest(prefix, **change)
    with pytest.raises(UserError, match=problem):
        check_manifest(prefix, manifest)
    with pytest.raises(UserError, match=problem):
        TokenSource(prefix)


def test_a_flipped_bit_is_found_by_verifying(prefix):
    manifest = oracle.make_manifest(prefix)
    content = bytearray(Path(f"{prefix}.bin").read_bytes())
    content[4] ^= 1
    Path(f"{prefix}.bin").write_bytes(content)
    check_manifest(prefix, manifest)
    with pytest.raises(
        UserError, match=r"a\.bin: bytes 0 to 67,108,863 \(or the end\) have checksum [0-9a-f]{64}, but its manifest"
    ):
        check_manifest(prefix, manifest, verify=True)


def test_verifying_needs_a_checksum(prefix):
    manifest = oracle.make_manifest(prefix, checksums=Checksums(bin=[], idx=[]))
    with pytest.raises(UserError, match=r"a\.idx: .* but its manifest records nothing"):
        check_manifest(prefix, manifest, verify=True)


def test_a_vocabulary_larger_than_the_models_is_refused(prefix):
    manifest = oracle.make_manifest(prefix)
    check_vocabulary(prefix, manifest, 300)
    with pytest.raises(UserError, match=r"tokenizer has 300 ids \(largest stored: 299\), the model only 299"):
        check_vocabulary(prefix, manifest, 299)
    lying = replace(manifest, tokenizer=replace(manifest.tokenizer, vocab_size=10))
    with pytest.raises(UserError, match=r"set model\.vocab_size to at least 300"):
        check_vocabulary(prefix, lying, 299)
    with pytest.raises(UserError, match="the model only 256"):
        TokenSource(prefix, vocab_size=256)


def test_counts_below_the_possible_are_refused(prefix):
    manifest = oracle.make_manifest(prefix)
    for key, value in (("documents", 0), ("tokens", -1), ("words", -1), ("largest_token_id", -1)):
        with pytest.raises(ValueError, match=f"{key} is {value}, below"):
            replace(manifest, **{key: value})
        manifest_path(prefix).write_text(json.dumps({**asdict(manifest), key: value}))
        with pytest.raises(UserError, match=f"{key} is {value}, below"):
            read_manifest(prefix)


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(prefix, monkeypatch):
    manifest = oracle.make_manifest(prefix)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        write_manifest(prefix, replace(manifest, words=1))
    assert read_manifest(prefix) == manifest
    assert sorted(path.suffix for path in prefix.parent.iterdir()) == [".bin", ".idx", ".json"]


def test_ids_of_a_dataset_without_manifest_are_checked_when_read(tmp_path):
    source = TokenSource(oracle.write(tmp_path / "b", [[[1, 2]], [[3, 500, 5]]]), vocab_size=300)
    out = np.empty(3, np.int64)
    source.read(0, out)
    assert out.tolist() == [1, 2, 3]
    with pytest.raises(UserError, match=r"token 3 \(document 1\) is id 500, but the model's vocabulary is 0 to 299"):
        source.read(2, out)
    negative = TokenSource(oracle.write(tmp_path / "c", [[[1, -2, 3]]], "int32"), vocab_size=300)
    with pytest.raises(UserError, match=r"token 1 \(document 0\) is id -2"):
        negative.read(0, out)
