"""Every way a dataset can be damaged is one clear error when it is opened."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import indexed_oracle as oracle
import pytest

from megachiar.data.storage import reader
from megachiar.data.storage.reader import IndexedDataset
from megachiar.errors import UserError

DOCUMENTS = [[[1, 2, 3], [4, 5]], [[6]], [[7, 8, 9, 10]]]  # 4 sequences, 3 documents
LENGTHS, POINTERS, STARTS, END = 34, 34 + 4 * 4, 34 + 12 * 4, 34 + 12 * 4 + 8 * 4


def patch(suffix: str, offset: int, content: bytes) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        path = Path(f"{prefix}.{suffix}")
        whole = bytearray(path.read_bytes())
        whole[offset : offset + len(content)] = content
        path.write_bytes(bytes(whole))

    return damage


def cut(suffix: str, size: int) -> Callable[[Path], None]:
    return lambda prefix: os.truncate(f"{prefix}.{suffix}", size)


def append(suffix: str, content: bytes) -> Callable[[Path], None]:
    def damage(prefix: Path) -> None:
        with open(f"{prefix}.{suffix}", "ab") as file:
            file.write(content)

    return damage


def remove(suffix: str) -> Callable[[Path], None]:
    return lambda prefix: os.unlink(f"{prefix}.{suffix}")


def swap(prefix: Path) -> None:
    stream, index = Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.bin").write_bytes(index)
    Path(f"{prefix}.idx").write_bytes(stream)


def leave_only_temporary(prefix: Path) -> None:
    for suffix in ("bin", "idx"):
        os.rename(f"{prefix}.{suffix}", f"{prefix}.{suffix}.tmp")


def empty_dataset(prefix: Path) -> None:
    Path(f"{prefix}.idx").write_bytes(oracle.pack([], "uint16")[1])


def of_other_dataset(prefix: Path) -> None:
    Path(f"{prefix}.bin").write_bytes(oracle.pack([[[1] * 11]], "uint16")[0])


DAMAGES = {
    "no .bin": (remove("bin"), ".bin", "does not exist"),
    "no .idx": (remove("idx"), ".idx", "does not exist"),
    "only leftovers": (leave_only_temporary, ".idx", "unfinished run"),
    "empty .bin": (cut("bin", 0), ".bin", "is empty"),
    "empty .idx": (cut("idx", 0), ".idx", "is empty"),
    "swapped": (swap, ".idx", "20 bytes, but an index has at least 34"),
    "header cut": (cut("idx", 33), ".idx", "33 bytes, but an index has at least 34"),
    "lengths cut": (cut("idx", LENGTHS + 5), ".idx", "39 bytes, but its header counts 4 sequences"),
    "starts one byte short": (cut("idx", END - 1), ".idx", "which take 114 bytes"),
    "index too long": (append("idx", b"\0"), ".idx", "115 bytes, but its header counts"),
    "multimodal": (append("idx", b"\0\0\0\0"), ".idx", "multimodal"),
    "magic": (patch("idx", 0, b"MMIDIDY"), ".idx", "this is no index"),
    "old format": (patch("idx", 0, b"TNTIDX\0\0"), ".idx", "this is no index"),
    "version": (patch("idx", 9, struct.pack("<Q", 2)), ".idx", "version 2 of the format"),
    "type code 0": (patch("idx", 17, b"\0"), ".idx", "type code 0 at byte 17"),
    "type code 9": (patch("idx", 17, b"\x09"), ".idx", "type code 9 at byte 17"),
    "another type of 4 bytes": (patch("idx", 17, b"\x04"), ".bin", "20 bytes, but a.idx describes 28 bytes of int32"),
    "more sequences": (patch("idx", 18, struct.pack("<Q", 5)), ".idx", "counts 5 sequences"),
    "huge count": (patch("idx", 18, struct.pack("<Q", 2**64 - 1)), ".idx", "header counts 18,446,744,073,709,551,615"),
    "fewer documents": (patch("idx", 26, struct.pack("<Q", 3)), ".idx", "3 document starts"),
    "no sequences": (empty_dataset, ".idx", "holds 0 sequences"),
    "length changed": (patch("idx", LENGTHS, struct.pack("<i", 2)), ".idx", "lengths before it end at byte 4"),
    "length negative": (patch("idx", LENGTHS, struct.pack("<i", -3)), ".idx", "length -3"),
    "last length changed": (patch("idx", LENGTHS + 12, struct.pack("<i", 5)), ".bin", "describes 22 bytes"),
    "last length negative": (patch("idx", LENGTHS + 12, struct.pack("<i", -4)), ".bin", "20 bytes, but"),
    "first pointer": (
        patch("idx", POINTERS, struct.pack("<q", 2)),
        ".idx",
        "sequence 0 has length 3 and begins at byte 2",
    ),
    "inner pointer": (patch("idx", POINTERS + 16, struct.pack("<q", 8)), ".idx", "sequence 2"),
    "last pointer": (patch("idx", POINTERS + 24, struct.pack("<q", 14)), ".bin", "describes 22 bytes"),
    "first start": (patch("idx", STARTS, struct.pack("<q", 1)), ".idx", "documents span sequences 1 to 4"),
    "last start": (patch("idx", STARTS + 24, struct.pack("<q", 3)), ".idx", "documents span sequences 0 to 3"),
    "starts fall": (patch("idx", STARTS + 8, struct.pack("<q", 9)), ".idx", "document 2 begins before document 1"),
    ".bin halved": (cut("bin", 10), ".bin", "10 bytes, but"),
    ".bin one byte short": (cut("bin", 19), ".bin", "19 bytes, but"),
    ".bin one byte long": (append("bin", b"\0"), ".bin", "21 bytes, but"),
    ".bin of another dataset": (of_other_dataset, ".bin", "22 bytes, but"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_on_open(tmp_path, name):
    damage, suffix, problem = DAMAGES[name]
    prefix = oracle.write(tmp_path / "a", DOCUMENTS)
    IndexedDataset(prefix)
    damage(prefix)
    with pytest.raises(UserError) as refused:
        IndexedDataset(prefix)
    assert refused.value.where == f"{prefix}{suffix}"
    assert problem in str(refused.value)
    assert refused.value.remedy


def test_naming_a_file_instead_of_the_prefix_is_explained(tmp_path):
    prefix = oracle.write(tmp_path / "a", DOCUMENTS)
    for suffix in (".bin", ".idx"):
        with pytest.raises(UserError, match=f"without its suffix: try {prefix}"):
            IndexedDataset(f"{prefix}{suffix}")


def test_a_folder_is_no_dataset(tmp_path):
    (tmp_path / "a.idx").mkdir()
    with pytest.raises(UserError, match="it is a folder, not a regular file"):
        IndexedDataset(tmp_path / "a")


def test_a_long_index_is_checked_in_spread_blocks_and_whole_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "ROWS_CHECKED_ON_OPEN", 2 * 256)
    sequences = 5_000
    prefix = oracle.write(tmp_path / "a", [[[1, 2]]] * sequences)
    IndexedDataset(prefix).check_index()

    checked = {row for part in reader._spread_rows(sequences) for row in range(part.start, part.stop)}
    assert len(checked) == 512 and {0, sequences - 1} <= checked
    skipped = next(row for row in range(sequences) if row not in checked and row + 1 not in checked)
    pointers = 34 + 4 * sequences
    patch("idx", pointers + 8 * skipped, struct.pack("<q", 1))(prefix)
    with pytest.raises(UserError, match=f"sequence {skipped:,} has length 2 and begins at byte 1"):
        IndexedDataset(prefix).check_index()
    first_checked = min(row for row in checked if row > 1)
    patch("idx", pointers + 8 * first_checked, struct.pack("<q", 1))(prefix)
    with pytest.raises(UserError, match=f"sequence {first_checked:,} has"):
        IndexedDataset(prefix)
