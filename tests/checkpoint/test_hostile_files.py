"""A file of tensors is read or refused whatever its header says, and a link in a run folder leads nowhere else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hostile import EXAMPLES, HOSTILE_VALUES, for_each_damage, refused, with_hostile_values

from megachiar.checkpoint.removal import discard, remove_checkpoint
from megachiar.checkpoint.save import _prepare
from megachiar.checkpoint.sharded_tensors import ShardReader, write_safetensors

pytestmark = pytest.mark.timeout(60)
NAME = "weights-p00-t00-d00.safetensors"


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("tensors") / NAME
    tensors = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2)}
    shards = json.dumps({"a": [0, 1]})
    write_safetensors(path, tensors, {"format": "pt", "rank": "0", "size": "1", "shards": shards})
    return path.read_bytes()


def parts(content: bytes) -> tuple[dict, bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: bytes, tensors: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + tensors


def read(folder: Path, content: bytes) -> None:
    (folder / NAME).write_bytes(content)
    reader = ShardReader(folder, [NAME])
    for name in reader.names():
        reader.whole(name)


@EXAMPLES
def test_damage_to_a_file_of_tensors_is_read_or_refused(content, tmp_path, examples):
    read(tmp_path, content)
    for_each_damage(content, lambda damaged: refused(lambda: read(tmp_path, damaged)), examples)


def test_any_value_of_a_header_is_read_or_refused(content, tmp_path):
    header, tensors = parts(content)
    values = [str(value) for value in HOSTILE_VALUES] + ["[0, 10000000000000]", "1000000000000"]
    shards = [{"a": [dim, blocks]} for dim in (-1, 0, 1, 2, 10**12) for blocks in (-1, 0, 1, 2, 3, 10**12)]
    metadata = [{**header["__metadata__"], key: value} for key in ("rank", "size", "shards") for value in values] + [
        {**header["__metadata__"], "shards": json.dumps(cut), "size": size} for cut in shards for size in ("1", "99")
    ]
    for changed in [*with_hostile_values(header), *({**header, "__metadata__": other} for other in metadata)]:
        damaged = joined(json.dumps(changed).encode(), tensors)
        refused(lambda damaged=damaged: read(tmp_path, damaged))


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**60, 2**63, 2**64 - 1])
def test_an_absurd_length_of_the_header_is_refused(content, tmp_path, size):
    assert refused(lambda: read(tmp_path, size.to_bytes(8, "little") + content[8:])) is not None


def test_absurd_shapes_and_names_that_repeat_are_refused(content, tmp_path):
    header, tensors = parts(content)
    text = json.dumps(header)
    for changed in (
        text.replace("[3, 4]", "[4611686018427387904, 8]"),
        text.replace("[3, 4]", "[-3, -4]"),
        text.replace("[0, 48]", "[0, 1152921504606846976]"),
        text.replace("[0, 48]", "[48, 0]"),
        text.replace('"b"', '"a"'),
        text.replace("F32", "F999"),
    ):
        assert changed != text
        assert refused(lambda changed=changed: read(tmp_path, joined(changed.encode(), tensors))) is not None, changed


def test_a_checkpoint_that_is_a_link_is_removed_without_what_it_leads_to(tmp_path):
    """Else the link would stay under the name of the next save, which would write through it."""
    folder, archive = tmp_path / "run" / "checkpoints", tmp_path / "archive"
    archive.mkdir()
    (archive / "state.json").write_text("kept")
    folder.mkdir(parents=True)
    (folder / "step_00000001").symlink_to(archive)
    remove_checkpoint(folder / "step_00000001")
    assert list(folder.iterdir()) == []
    for name, what in (("1", archive), ("2", tmp_path / "nothing"), ("3", None)):
        path = folder / f"step_0000000{name}.incomplete"
        path.symlink_to(what) if what is not None else os.mkfifo(path)
    _prepare(folder, 0)
    assert list(folder.iterdir()) == []
    assert [path.read_text() for path in archive.iterdir()] == ["kept"]
    discard(folder / "nothing")
