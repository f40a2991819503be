"""Readers: every format gives the same documents, however it is cut; every way of being broken is named and placed."""

from __future__ import annotations

import gzip
import io
import random
import re
import subprocess
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from text_helpers import COMPRESS, DOCUMENTS, numbered_documents, write_jsonl

from megachiar.data.inputs import compression
from megachiar.data.inputs.compression import MOST_TEXT, text_blocks
from megachiar.data.inputs.documents import (
    EXAMPLES_PER_KIND,
    Chunk,
    Document,
    InvalidDocument,
    InvalidDocumentLog,
    ReadOptions,
)
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.inputs.parsing import parse_chunk
from megachiar.data.inputs.readers import read_chunks, read_documents
from megachiar.errors import UserError

pytestmark = pytest.mark.every_python

TEXTS = DOCUMENTS + numbered_documents(30)


def read(path: Path | str, format: str | None = None, on_error: str = "refuse", **options) -> list[str]:
    """Texts of one input."""
    log = InvalidDocumentLog(on_error)
    documents = list(read_documents(find_sources([path], format), ReadOptions(**options), log))
    assert all(document.utf8 == document.text.encode() for document in documents)
    return [document.text for document in documents]


def invalid_documents(path: Path, **options) -> list[InvalidDocument]:
    """What cannot be used in one input."""
    log = InvalidDocumentLog("skip")
    list(read_documents(find_sources([path]), ReadOptions(**options), log))
    return log.examples


def write_parquet(path: Path, column: pyarrow.Array, name: str = "text", **options) -> Path:
    parquet.write_table(pyarrow.table({"id": list(range(len(column))), name: column}), path, **options)
    return path


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.json.gz", "A.JSONL.GZ", *(f"a.jsonl{end}" for end in COMPRESS)]
)
@pytest.mark.parametrize("chunk_bytes", [1, 500, 1 << 20])
def test_json_lines_give_the_documents_in_order(tmp_path, name, chunk_bytes):
    assert read(write_jsonl(tmp_path / name, TEXTS), chunk_bytes=chunk_bytes) == TEXTS


@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n  \n"])
def test_the_end_of_the_last_line_and_blank_lines_do_not_matter(tmp_path, ending):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\r\n\n{"text": "b"}' + ending)
    assert read(path) == ["a", "b"]


def test_members_of_a_compressed_file_follow_each_other(tmp_path):
    halves = [write_jsonl(tmp_path / f"{half}.jsonl", part).read_bytes() for half, part in enumerate((TEXTS, ["z"]))]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(halves[0]) + gzip.compress(halves[1]))
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00four"  # a frame without text, which pzstd writes
    frames = skippable + zstandard.compress(halves[0]) + zstandard.compress(halves[1])
    (tmp_path / "b.jsonl.zst").write_bytes(frames)
    assert read(tmp_path / "a.jsonl.gz") == read(tmp_path / "b.jsonl.zst") == [*TEXTS, "z"]
    for suffix in (".xz", ".bz2"):
        path = tmp_path / f"c.jsonl{suffix}"
        path.write_bytes(b"".join(map(COMPRESS[suffix], halves)))
        assert read(path) == [*TEXTS, "z"]


def test_zstandard_with_a_large_window_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    content = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(content) + compressor.flush())
    assert read(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_a_text_file_is_one_document(tmp_path, suffix):
    text = "\n\n".join(TEXTS)
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS.get(suffix, bytes)(text.encode()))
    assert read(tmp_path / f"a.txt{suffix}") == [text]


@pytest.mark.parametrize("suffix", [".xz", ".bz2"])
def test_what_grows_ten_thousandfold_is_read_in_pieces(tmp_path, suffix):
    text = "x" * (40 << 20)
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    (source,) = find_sources([tmp_path / f"a.txt{suffix}"])
    sizes = [len(block) for block, _ in text_blocks(source)]
    assert sum(sizes) == len(text) and max(sizes) <= MOST_TEXT


@pytest.mark.parametrize("chunk_bytes", [1, 7, 1 << 20])
def test_lines_can_be_documents(tmp_path, chunk_bytes):
    path = tmp_path / "a.txt"
    path.write_bytes("first\r\nsecond ü\n third".encode())
    assert read(path, txt_documents="line", chunk_bytes=chunk_bytes) == ["first", "second ü", " third"]


@pytest.mark.parametrize("chunk_bytes", [1, 5, 12, 1 << 20])
@pytest.mark.parametrize("read_bytes", [1, 3, 1 << 18])
def test_what_blank_lines_separate_can_be_documents(tmp_path, chunk_bytes, read_bytes, monkeypatch):
    monkeypatch.setattr("megachiar.data.inputs.compression.READ_BYTES", read_bytes)
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\nstill one\n\ntwo\r\n \t\r\n\n\nthree\nstill three\n\n\n")
    options = {"txt_documents": "blank-line", "chunk_bytes": chunk_bytes}
    assert read(path, **options) == ["one\nstill one", "two", "three\nstill three"]


def test_a_long_document_between_blank_lines_is_found_in_linear_time(tmp_path):
    paragraph = "short line\n" * 200_000
    (tmp_path / "a.txt").write_text(paragraph + "\nend")
    options = {"txt_documents": "blank-line", "chunk_bytes": 1000}
    assert read(tmp_path / "a.txt", **options) == [paragraph[:-1], "end"]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        *([pyarrow.string_view()] if hasattr(pyarrow, "string_view") else []),
        pyarrow.binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_parquet_gives_its_rows(tmp_path, kind, chunk_bytes):
    texts = [text.encode() for text in TEXTS] if kind == pyarrow.binary() else TEXTS
    path = write_parquet(tmp_path / "a.parquet", pyarrow.array(texts).cast(kind), row_group_size=7)
    assert read(path, chunk_bytes=chunk_bytes) == TEXTS


def test_another_key_or_column_can_hold_the_text(tmp_path):
    assert read(write_jsonl(tmp_path / "a.jsonl", TEXTS, key="content"), text_key="content") == TEXTS
    assert read(write_parquet(tmp_path / "a.parquet", pyarrow.array(TEXTS), "body"), text_key="body") == TEXTS


def test_a_byte_order_mark_is_no_text_and_offsets_count_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\nbroken')
    assert read(tmp_path / "a.jsonl", on_error="skip") == ["a"]
    assert invalid_documents(tmp_path / "a.jsonl")[0].where.endswith("a.jsonl:2 (byte 17)")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    assert "(byte 5)" in invalid_documents(tmp_path / "a.txt")[0].where


def test_standard_input_is_jsonl_unless_told(tmp_path, monkeypatch):
    class Pipe:
        buffer = io.BytesIO(write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes())

    monkeypatch.setattr("sys.stdin", Pipe)
    assert read("-") == TEXTS
    Pipe.buffer = io.BytesIO(gzip.compress(b"one\ntwo"))
    assert read("-", "txt.gz", txt_documents="line") == ["one", "two"]
    with pytest.raises(UserError, match="parquet is read from its end"):
        find_sources(["-"], "parquet")


def test_chunks_are_small_and_never_cut_a_document(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 20)
    chunks = list(read_chunks(find_sources([path]), ReadOptions(chunk_bytes=1000)))
    content = path.read_bytes()
    assert b"".join(chunk.data for chunk in chunks) == content
    assert sum(chunk.consumed for chunk in chunks) == len(content)
    assert [chunk.offset for chunk in chunks] == [
        sum(len(before.data) for before in chunks[:number]) for number in range(len(chunks))
    ]
    assert all(chunk.data.endswith(b"\n") for chunk in chunks)


def test_reading_holds_a_chunk_not_the_file(tmp_path):
    texts = [random.Random(number).randbytes(4000).hex() for number in range(1000)]
    path = write_jsonl(tmp_path / "a.jsonl.zst", texts)
    sizes = [len(chunk.data) for chunk in read_chunks(find_sources([path]), ReadOptions(chunk_bytes=100_000))]
    assert sum(sizes) > 8_000_000
    assert max(sizes) < 300_000


# --- broken files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gz", "zst", "xz", "bz2"])
@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_a_truncated_compressed_file_is_named(tmp_path, suffix, keep):
    path = write_jsonl(tmp_path / f"a.jsonl.{suffix}", TEXTS * 100)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)] if isinstance(keep, float) else content[:keep])
    with pytest.raises(UserError, match=rf"a\.jsonl\.{suffix}: is truncated: it ends after \d+ bytes"):
        read(path)


@pytest.mark.parametrize("suffix", ["gz", "zst", "xz", "bz2"])
@pytest.mark.parametrize("at_block_end", [False, True])
def test_what_follows_whole_compressed_data_is_named_with_its_place(tmp_path, monkeypatch, suffix, at_block_end):
    path = tmp_path / f"a b.jsonl.{suffix}"
    whole = 2 * COMPRESS[f".{suffix}"](b'{"text": "a"}\n')
    path.write_bytes(whole + b"garbage after the end, which may be a lost file")
    if at_block_end:
        monkeypatch.setattr(compression, "COMPRESSED_READ_BYTES", len(whole))
    with pytest.raises(UserError, match=f"is whole up to byte {len(whole)}, but goes on with .* b'garbage") as caught:
        read(path)
    assert "fetch it again" in caught.value.remedy
    subprocess.run(re.search("`(.*)`", caught.value.remedy)[1], shell=True, check=True)
    assert read(path) == ["a", "a"]


@pytest.mark.parametrize("suffix", ["gz", "zst", "xz", "bz2"])
def test_a_damaged_member_is_named_with_its_place(tmp_path, suffix):
    path = tmp_path / f"a.jsonl.{suffix}"
    whole = COMPRESS[f".{suffix}"](b'{"text": "a"}\n')
    path.write_bytes(whole + whole[:6] + bytes(byte ^ 255 for byte in whole[6:]))
    with pytest.raises(UserError, match=f"is damaged near byte {len(whole)}: ") as caught:
        read(path)
    assert "fetch it again" in caught.value.remedy


@pytest.mark.parametrize("suffix", ["gz", "zst", "xz", "bz2"])
def test_zeros_after_the_end_are_named_and_the_command_cuts_them(tmp_path, suffix):
    path = write_jsonl(tmp_path / f"a b.jsonl.{suffix}", TEXTS)
    path.write_bytes(path.read_bytes() + bytes(100_000))
    with pytest.raises(UserError, match=r"holds only zeros from byte \d+ on, after whole compressed data") as caught:
        read(path)
    command = re.search("`(.*)`", caught.value.remedy)[1]
    subprocess.run(command, shell=True, check=True)
    assert read(path) == TEXTS
    path.write_bytes(path.read_bytes() + bytes(100) + write_jsonl(tmp_path / f"b.jsonl.{suffix}", ["z"]).read_bytes())
    with pytest.raises(UserError, match=r"damaged near byte .*: zeros stand where compressed data should follow"):
        read(path)


def test_a_damaged_checksum_of_gzip_is_seen(tmp_path):
    content = bytearray(gzip.compress(b'{"text": "a"}\n'))
    content[-6] ^= 1
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged near byte 0: .*incorrect data check"):
        read(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 1000])
def test_an_unreadable_parquet_file_is_named(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: is not a whole parquet file"):
        read(tmp_path / "a.parquet")


def test_a_truncated_or_damaged_parquet_file_is_named(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", pyarrow.array(TEXTS * 50), use_dictionary=False, write_page_checksum=True
    )
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.parquet: is not a whole parquet file"):
        read(path)
    damaged = bytearray(content)
    column = parquet.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(1)
    damaged[column.data_page_offset + column.total_compressed_size // 2] ^= 0x5A
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.parquet: "):
        read(path)


def test_a_column_that_is_missing_or_no_text_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", pyarrow.array(TEXTS))
    with pytest.raises(UserError, match="has no column 'body', only id, text"):
        read(path, text_key="body")
    with pytest.raises(UserError, match="column 'id' holds int64, not text"):
        read(path, text_key="id")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jsonl", {}),
        ("a.txt", {}),
        ("a.txt", {"txt_documents": "line"}),
        ("a.txt", {"txt_documents": "blank-line"}),
    ],
)
def test_a_document_too_large_for_memory_ends_the_run(tmp_path, name, options):
    (tmp_path / name).write_bytes(b"x" * (3 << 20))
    with pytest.raises(UserError, match=r"documents may have 1 MiB\n.*--max-document-mib"):
        read(tmp_path / name, max_document_bytes=1 << 20, chunk_bytes=1000, on_error="skip", **options)


def test_a_row_too_large_for_memory_ends_the_run(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", pyarrow.array(["x" * (1 << 20), None, "y" * (3 << 20)]))
    with pytest.raises(UserError, match=r"the document 3 has 3 MiB or more; documents may have 1 MiB\n.*--max-doc"):
        read(path, max_document_bytes=1 << 20, on_error="skip")
    assert len(read(path, max_document_bytes=3 << 20, on_error="skip")) == 2


def test_a_disk_that_fails_is_named(tmp_path, monkeypatch):
    class Pipe:
        class buffer:
            @staticmethod
            def read(size):
                raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.stdin", Pipe)
    with pytest.raises(UserError, match="standard input: cannot read: Input/output error"):
        read("-")


# --- broken documents -------------------------------------------------------------------------------------------------

GOOD = b'{"text": "good"}\n'
BROKEN_LINES = [
    (b'{"text": "a"', "broken_json", 12, "broken JSON: Expecting ',' delimiter"),
    ('{"ü": "ü", "text" 1}'.encode(), "broken_json", 20, "broken JSON: Expecting ':' delimiter"),
    (b"[" * 100_000, "broken_json", 0, "cannot parse JSON"),
    (b'{"n": ' + b"9" * 5000 + b"}", "broken_json", 0, "cannot parse JSON"),
    (b'{"text": "caf\xe9"}', "invalid_utf8", 13, "byte 0xe9 is not valid UTF-8"),
    (b'{"text": "half \\ud83d"}', "invalid_utf8", 0, r"character 5 is half of a surrogate pair (\ud83d)"),
    (b'{"body": "a", "id": 1}', "missing_text", 0, "has no key 'text'; keys are body, id"),
    (b"{}", "missing_text", 0, "keys are none at all"),
    (b'{"text": 5}', "not_a_string", 0, "'text' is a JSON number, not a string"),
    (b'{"text": null}', "not_a_string", 0, "'text' is a JSON null, not a string"),
    (b'{"text": ["a"]}', "not_a_string", 0, "'text' is a JSON array, not a string"),
    (b'["text"]', "not_an_object", 0, "a JSON array where an object is expected"),
    (b"true", "not_an_object", 0, "a JSON true where an object is expected"),
    (b'{"text": ""}', "empty", 0, "is empty"),
    (b'{"text": " \\n\\u3000"}', "empty", 0, "is empty"),
]


@pytest.mark.parametrize(("line", "kind", "byte", "problem"), BROKEN_LINES, ids=lambda value: str(value)[:24])
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_a_broken_line_is_placed_and_its_neighbours_are_kept(tmp_path, line, kind, byte, problem, chunk_bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 3 + line + b"\n" + GOOD)
    log = InvalidDocumentLog("skip")
    options = ReadOptions(chunk_bytes=chunk_bytes)
    documents = list(read_documents(find_sources([path]), options, log))
    assert [document.text for document in documents] == ["good"] * 4
    assert log.counts == {kind: 1}
    assert log.examples[0].where == f"{path}:4 (byte {3 * len(GOOD) + byte})"
    assert problem in log.examples[0].problem
    with pytest.raises(UserError) as caught:
        read(path, chunk_bytes=chunk_bytes)
    assert f"a.jsonl:4 (byte {3 * len(GOOD) + byte})" in str(caught.value)
    assert "--on-error skip" in caught.value.remedy


def test_bytes_of_compressed_text_are_called_so(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD + b"{"))
    assert invalid_documents(tmp_path / "a.jsonl.gz")[0].where.endswith(
        "a.jsonl.gz:2 (byte 18 of the decompressed text)"
    )


def test_broken_text_files_are_placed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\nb\xffd\n\n\ngood")
    assert invalid_documents(path)[0] == InvalidDocument(
        "invalid_utf8", f"{path} (byte 7)", "byte 0xff is not valid UTF-8"
    )
    assert invalid_documents(path, txt_documents="blank-line")[0].where == f"{path}:3 (byte 7)"
    by_line = invalid_documents(path, txt_documents="line")
    assert [(invalid.kind, invalid.where.rpartition(":")[2]) for invalid in by_line] == [
        ("empty", "2 (byte 5)"),
        ("invalid_utf8", "3 (byte 7)"),
        ("empty", "4 (byte 10)"),
        ("empty", "5 (byte 11)"),
    ]
    (tmp_path / "b.txt").write_bytes(b" \n")
    assert invalid_documents(tmp_path / "b.txt")[0].kind == "empty"


def test_broken_parquet_rows_are_placed(tmp_path):
    column = pyarrow.array([b"good", None, b"b\xffd", b"", b"good"], pyarrow.binary())
    path = write_parquet(tmp_path / "a.parquet", column)
    found = [(invalid.kind, invalid.where) for invalid in invalid_documents(path, chunk_bytes=1)]
    assert found == [
        ("not_a_string", f"{path}: document 2"),
        ("invalid_utf8", f"{path}: document 3 (byte 1)"),
        ("empty", f"{path}: document 4 (byte 0)"),
    ]
    assert read(path, on_error="skip") == ["good", "good"]


def test_all_are_counted_and_the_first_few_of_each_kind_are_kept():
    chunk = Chunk("a.jsonl", "jsonl", b'{"text": ""}\n' * 10 + b"{\n" * 5)
    items = list(parse_chunk(chunk))
    assert len(items) == 15 and not any(isinstance(item, Document) for item in items)
    halves = InvalidDocumentLog("skip"), InvalidDocumentLog("skip")
    for number, item in enumerate(items):
        halves[number // 8].add(item)
    halves[0].merge(halves[1])
    assert halves[0].counts == {"empty": 10, "broken_json": 5}
    kept = [invalid.where for invalid in halves[0].examples]
    assert kept == [f"a.jsonl:{line} (byte {byte})" for line, byte in zip((1, 2, 3), (0, 13, 26), strict=True)] + [
        f"a.jsonl:{line} (byte {byte})" for line, byte in zip((11, 12, 13), (131, 133, 135), strict=True)
    ]
    assert len(kept) == 2 * EXAMPLES_PER_KIND
