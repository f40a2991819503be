"""Arrays of JSON, comma-separated values, Arrow files and folders of `datasets`: the documents, and what is broken."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path

import pyarrow
import pytest
from pyarrow import ipc
from text_helpers import COMPRESS, DOCUMENTS, numbered_documents

from megachiar.data.inputs.documents import InvalidDocument, InvalidDocumentLog, ReadOptions
from megachiar.data.inputs.find_inputs import find_inputs, find_sources
from megachiar.data.inputs.readers import read_chunks, read_documents
from megachiar.errors import UserError

pytestmark = pytest.mark.every_python

TEXTS = [
    *DOCUMENTS,
    *numbered_documents(30),
    'quotes " and ""',
    "a,b\r\nc,d\n",
    " leading",
    "\\ \\u00e9 [1] {x}",
    "é" * 300,
]
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read(path: Path | str, format: str | None = None, **options) -> list[str]:
    """Texts of one input."""
    documents = list(read_documents(find_sources([path], format), ReadOptions(**options), InvalidDocumentLog()))
    assert all(document.utf8 == document.text.encode() for document in documents)
    return [document.text for document in documents]


def invalid(path: Path, **options) -> list[InvalidDocument]:
    log = InvalidDocumentLog("skip")
    list(read_documents(find_sources([path]), ReadOptions(**options), log))
    return log.examples


def refused(path: Path, **options) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path, **options)
    assert caught.value.remedy
    return caught.value


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
    return path


def as_csv(texts: list[str], **options) -> bytes:
    """A table as Python's own writer makes it."""
    table = io.StringIO(newline="")
    writer = csv.writer(table, **options)
    writer.writerows([["id", "text", "label"], *([n, text, f"l{n % 3}"] for n, text in enumerate(texts))])
    return table.getvalue().encode()


def write_stream(path: Path, table: pyarrow.Table, rows: int = 7) -> Path:
    with open(path, "wb") as file, ipc.new_stream(file, table.schema) as writer:
        for batch in table.to_batches(rows):
            writer.write_batch(batch)
    return path


def write_file(path: Path, table: pyarrow.Table, rows: int = 7, **options) -> Path:
    with ipc.new_file(path, table.schema, options=ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.to_batches(rows):
            writer.write_batch(batch)
    return path


def save_to_disk(folder: Path, texts: list[str], shards: int = 2) -> Path:
    """A folder as `datasets.Dataset.save_to_disk` leaves it."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{shards:05d}.arrow" for n in range(shards)]
    for number, name in enumerate(names):
        share = texts[number * len(texts) // shards : (number + 1) * len(texts) // shards]
        write_stream(folder / name, pyarrow.table({"text": share, "id": list(range(len(share)))}))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0f", "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    described = {"features": {"text": {"dtype": "string", "_type": "Value"}}, "citation": ""}
    (folder / "dataset_info.json").write_text(json.dumps(described, indent=2))
    return folder


# --- arrays of JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", *(f"a.json{end}" for end in COMPRESS)])
@pytest.mark.parametrize("chunk_bytes", [1, 700, 1 << 20])
@pytest.mark.parametrize("layout", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_an_array_gives_its_elements_in_order(tmp_path, name, chunk_bytes, layout):
    records = [{"n": [number, -1.5e3, None, {"x": "]"}], "text": text} for number, text in enumerate(TEXTS)]
    path = write(tmp_path / name, json.dumps(records, **layout).encode())
    assert read(path, chunk_bytes=chunk_bytes) == TEXTS


def test_an_array_has_a_mark_and_space_around_it(tmp_path):
    path = write(tmp_path / "a.json", b'\xef\xbb\xbf \n[ {"text":"a"}\t,\r\n{"text":"b"} ] \n')
    assert read(path) == ["a", "b"]
    assert [chunk.consumed for chunk in read_chunks(find_sources([path]), ReadOptions())] == [path.stat().st_size]


@pytest.mark.parametrize(
    ("content", "byte", "problem"),
    [
        (b'[{"text": "a"}, {"text": "b"', 28, "it is cut off"),
        (b'[{"text": "a"}, {"text": "bcd', 25, "it is cut off"),
        (b'[{"text": "a"},', 15, "it is cut off"),
        (b'[{"text": "a"}', 14, "it is cut off"),
        (b'[{"text": "a"}, ]', 16, "Expecting value"),
        (b'[{"text": "a"} {"text": "b"}]', 15, "'{' stands where , or ] is expected"),
        (b'[{"text": "a"}] {"text": "b"}' + b" " * 50 + b"[", 16, "other text follows the array"),
        (b'[{"text": "a"}, {text: "b"}' + b', {"text": "c"}' * 9 + b"]", 17, "Expecting property name"),
    ],
)
@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_a_broken_array_ends_the_run_at_its_byte(tmp_path, content, byte, problem, chunk_bytes):
    error = refused(write(tmp_path / "a.json", content), chunk_bytes=chunk_bytes)
    assert error.where.endswith(f"a.json (byte {byte})") and problem in error.problem


def test_elements_that_cannot_be_used_are_named_by_number_and_byte(tmp_path):
    content = b'[{"text": "a"}, {"body": "b"}, [1], {"text": "\xff"}, {"text": ""}, {"text": "\x01"}, 7]'
    found = invalid(write(tmp_path / "a.json", content))
    places = [
        ("missing_text", "element 2 (byte 16)"),
        ("not_an_object", "element 3 (byte 31)"),
        ("invalid_utf8", "element 4 (byte 46)"),
        ("empty", "element 5 (byte 51)"),
        ("broken_json", "element 6 (byte 75)"),
        ("not_an_object", "element 7 (byte 80)"),
    ]
    assert sorted((kind, where.partition(": ")[2]) for kind, where, _ in found) == sorted(places)


def test_a_large_element_is_refused_before_the_memory_is_full(tmp_path):
    path = write(tmp_path / "a.json", b'[{"text": "' + b"x" * (1 << 20) + b'"}]')
    assert "element at byte 1 has 0 MiB or more" in refused(path, max_document_bytes=1000, chunk_bytes=100).problem
    assert len(read(path)[0]) == 1 << 20


def test_a_folder_gives_arrays_and_leaves_settings_out(tmp_path):
    write(tmp_path / "data.json", json.dumps([{"text": "a"}], indent=1).encode())
    write(tmp_path / "one.json", b'[{"text": "b"}]')
    write(tmp_path / "settings.json", b'[{"name": "c"}]')
    (found,) = find_inputs([tmp_path]).found
    assert [source.path.name for source in found.sources] == ["data.json", "one.json"]
    assert [file.reason for file in found.left_out] == [".json without 'text' in it"]


# --- comma-separated values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", *(f"a.csv{end}" for end in COMPRESS)])
@pytest.mark.parametrize("chunk_bytes", [1, 700, 1 << 20])
@pytest.mark.parametrize("layout", [{}, {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"}])
def test_csv_gives_the_documents_that_were_written(tmp_path, name, chunk_bytes, layout):
    texts = [text for text in TEXTS if "\0" not in text]
    path = write(tmp_path / name, as_csv(texts, **layout))
    assert read(path, chunk_bytes=chunk_bytes) == texts
    assert read(path, text_key="label", chunk_bytes=chunk_bytes) == [f"l{n % 3}" for n in range(len(texts))]
    consumed = sum(chunk.consumed for chunk in read_chunks(find_sources([path]), ReadOptions(chunk_bytes=chunk_bytes)))
    assert consumed == path.stat().st_size


def test_csv_agrees_with_pythons_reader_on_random_tables(tmp_path):
    draw = random.Random(0)
    for _ in range(60):
        table = "text,b\n" + "".join(draw.choice("a,\"\n\r '") for _ in range(draw.randrange(40)))
        path = write(tmp_path / "a.csv", table.encode())
        try:
            rows = [row for row in csv.reader(io.StringIO(table, newline=""), strict=True) if row]
        except csv.Error:
            assert "broken CSV" in refused(path).problem
            continue
        wanted = [row[0] for row in rows[1:] if len(row) == 2 and row[0].strip()]
        log = InvalidDocumentLog("skip")
        assert [d.text for d in read_documents(find_sources([path]), ReadOptions(), log)] == wanted
        assert log.counts["bad_row"] == sum(len(row) != 2 for row in rows[1:])


@pytest.mark.parametrize(
    ("content", "where", "problem"),
    [
        (b"id,body\n1,a\n", "a.csv", "has no column 'text', only id, body"),
        (b"text,text\na,b\n", "a.csv", "has two columns 'text'"),
        (b'text\na\n"b\nc\nd', "a.csv:3 (byte 7)", "broken CSV: a quote that opens in this row is never closed"),
        (b'text\na\n"b" c\n', "a.csv:3 (byte 7)", "broken CSV: "),
    ],
)
def test_a_broken_table_is_refused_at_its_row(tmp_path, content, where, problem):
    error = refused(write(tmp_path / "a.csv", content))
    assert error.where.endswith(where) and problem in error.problem


def test_rows_that_cannot_be_used_are_named_by_line_and_byte(tmp_path):
    content = b'id,text\n1,"a\nb"\n2\n\n3,\xff\n4,\n5,c\n'
    found = [(kind, where.rpartition("/")[2]) for kind, where, _ in invalid(write(tmp_path / "a.csv", content))]
    assert found == [
        ("bad_row", "a.csv:4 (byte 16)"),
        ("invalid_utf8", "a.csv:6 (byte 19)"),
        ("empty", "a.csv:7 (byte 23)"),
    ]
    gzipped = invalid(write(tmp_path / "a.csv.gz", content))
    assert gzipped[0].where.endswith("a.csv.gz:4 (byte 16 of the decompressed text)")


# --- Arrow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write_table", [write_stream, write_file])
@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
@pytest.mark.parametrize("chunk_bytes", [1, 700, 1 << 20])
def test_arrow_gives_the_documents_in_order(tmp_path, write_table, kind, chunk_bytes):
    column = pyarrow.array(TEXTS).dictionary_encode() if kind == "dictionary" else pyarrow.array(TEXTS).cast(kind)
    path = write_table(tmp_path / "a.arrow", pyarrow.table({"id": list(range(len(TEXTS))), "text": column}))
    assert read(path, chunk_bytes=chunk_bytes) == TEXTS
    consumed = sum(chunk.consumed for chunk in read_chunks(find_sources([path]), ReadOptions()))
    assert 0.9 < consumed / path.stat().st_size <= 1.001


def test_compressed_arrow_and_feather_are_read(tmp_path):
    table = pyarrow.table({"text": TEXTS})
    assert read(write_file(tmp_path / "a.feather", table, compression="zstd")) == TEXTS


def test_arrow_rows_that_cannot_be_used_are_named_by_number(tmp_path):
    path = write_stream(tmp_path / "a.arrow", pyarrow.table({"text": ["a", None, "", "b"]}), rows=2)
    assert [(kind, where.partition(": ")[2]) for kind, where, _ in invalid(path)] == [
        ("not_a_string", "document 2"),
        ("empty", "document 3 (byte 0)"),
    ]
    bad = pyarrow.array([b"a", b"caf\xe9"]).view(pyarrow.string())
    (found,) = invalid(write_stream(tmp_path / "b.arrow", pyarrow.table({"text": bad})))
    assert found.kind == "invalid_utf8" and found.where.endswith("b.arrow: document 2 (byte 3)")


@pytest.mark.parametrize("write_table", [write_stream, write_file])
def test_an_arrow_file_that_is_cut_off_anywhere_is_refused(tmp_path, write_table):
    path = write_table(tmp_path / "a.arrow", pyarrow.table({"text": TEXTS}))
    content = path.read_bytes()
    for size in (1, 5, 9, 100, len(content) // 2, len(content) - 8, len(content) - 1):
        path.write_bytes(content[:size])
        error = refused(path)
        assert "is truncated" in error.problem or "is not an Arrow file" in error.problem
    path.write_bytes(b"")
    assert refused(path).problem == "is not an Arrow file, but empty"


def test_two_streams_in_one_file_are_refused(tmp_path):
    path = write_stream(tmp_path / "a.arrow", pyarrow.table({"text": TEXTS}))
    content = path.read_bytes()
    path.write_bytes(content + content)
    assert f"is whole up to byte {len(content)}, but goes on to byte {2 * len(content)}" in refused(path).problem


def test_damaged_offsets_are_an_error_and_no_crash(tmp_path):
    """The offset of one text points far beyond the file."""
    path = write_stream(tmp_path / "a.arrow", pyarrow.table({"text": ["abc", "defg", "hi"]}))
    content = path.read_bytes()
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 3, 7, 9))
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:4] + (1 << 30).to_bytes(4, "little") + offsets[8:]))
    assert "is damaged near byte" in refused(path).problem


def test_no_damaged_byte_gives_a_traceback(tmp_path):
    path = write_stream(tmp_path / "a.arrow", pyarrow.table({"text": TEXTS[:9]}))
    content, draw = path.read_bytes(), random.Random(1)
    for _ in range(150):
        place = draw.randrange(len(content))
        path.write_bytes(content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :])
        try:
            list(read_documents(find_sources([path]), ReadOptions(), InvalidDocumentLog("skip")))
        except UserError as error:
            assert error.remedy


@pytest.mark.parametrize(
    ("column", "options", "problem"),
    [
        ({"body": ["a"]}, {}, "has no column 'text', only body"),
        ({"text": [1]}, {}, "column 'text' holds int64, not text"),
        ({"a": [{"b": "x"}]}, {"text_key": "a.c"}, "has no column 'a.c', only a"),
        ({"a": [{"b": 1}]}, {"text_key": "a.b"}, "column 'a.b' holds int64, not text"),
    ],
)
def test_an_arrow_file_without_the_column_is_refused(tmp_path, column, options, problem):
    assert problem in refused(write_stream(tmp_path / "a.arrow", pyarrow.table(column)), **options).problem


# --- folders of `datasets` --------------------------------------------------------------------------------------------


def test_a_dataset_on_disk_is_its_table_alone(tmp_path):
    folder = save_to_disk(tmp_path / "set", TEXTS, shards=3)
    write_stream(folder / "cache-0123456789abcdef.arrow", pyarrow.table({"text": ["the same rows again"]}))
    (found,) = find_inputs([folder]).found
    texts = [d.text for d in read_documents(found.sources, ReadOptions(), InvalidDocumentLog())]
    assert texts == TEXTS
    assert sorted(file.name for file in found.left_out) == [
        "cache-0123456789abcdef.arrow",
        "dataset_info.json",
        "state.json",
    ]


def test_splits_are_not_joined(tmp_path):
    for split in ("train", "test"):
        save_to_disk(tmp_path / "all" / split, [f"{split} {n}" for n in range(9)])
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match="holds the splits train, test, which are not joined") as caught:
        find_inputs([tmp_path / "all"])
    assert caught.value.remedy == f"name the split: {tmp_path}/all/train"
    assert len(find_sources([tmp_path / "all" / "train"])) == 2
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train"]}')


def test_a_table_that_is_not_whole_is_refused(tmp_path):
    folder = save_to_disk(tmp_path / "set", TEXTS)
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"names data-00001-of-00002\.arrow, which is missing"):
        find_inputs([folder])


def test_a_dataset_of_the_library_itself_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "set"), num_shards=2)
    (found,) = find_inputs([tmp_path / "set"]).found
    assert [d.text for d in read_documents(found.sources, ReadOptions(), InvalidDocumentLog())] == TEXTS


# --- keys and bad bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".arrow", ".parquet"])
def test_a_key_may_lead_through_objects(tmp_path, suffix):
    from pyarrow import parquet

    records = [{"a": {"b": {"c": text}, "d": 1}, "x.y": text.upper()} for text in TEXTS]
    path = tmp_path / f"in{suffix}"
    if suffix in (".arrow", ".parquet"):
        table = pyarrow.Table.from_pylist(records)
        write_stream(path, table) if suffix == ".arrow" else parquet.write_table(table, path)
    else:
        lines = "\n".join(map(json.dumps, records)) if suffix == ".jsonl" else json.dumps(records)
        path.write_text(lines)
    assert read(path, text_key="a.b.c") == TEXTS
    assert read(path, text_key="x.y") == [text.upper() for text in TEXTS]
    both = read(path, text_key="a.b.c", more_text_keys=("x.y",))
    assert both == [f"{text}\n\n{text.upper()}" for text in TEXTS]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"title": "A", "text": "b"}, "A\n\nb"),
        ({"title": None, "text": "b"}, "b"),
        ({"title": "A", "text": " "}, "A"),
        ({"title": None, "text": ""}, "empty"),
        ({"text": "b"}, "missing_text"),
        ({"title": 7, "text": "b"}, "not_a_string"),
    ],
)
def test_several_keys_are_joined_and_none_is_missed(tmp_path, record, expected):
    path = write(tmp_path / "a.jsonl", json.dumps(record).encode())
    log = InvalidDocumentLog("skip")
    options = ReadOptions("title", more_text_keys=("text",))
    found = [document.text for document in read_documents(find_sources([path]), options, log)]
    assert found == [expected] if not log.counts else log.counts == {expected: 1}


BAD = b"caf\xe9 \xff\xfe ol\xc3"


@pytest.mark.parametrize(
    ("name", "content", "bad"),
    [
        ("a.txt", BAD, BAD),
        ("a.jsonl", b'{"text": "' + BAD + b'"}\n{"text": "ok"}\n', BAD),
        ("a.json", b'[{"text": "' + BAD + b'"}, {"text": "ok"}]', BAD),
        ("a.csv", b"text\n" + BAD + b"\nok\n", BAD),
    ],
)
def test_bad_bytes_are_replaced_and_counted(tmp_path, name, content, bad):
    path, log = write(tmp_path / name, content), InvalidDocumentLog("replace")
    documents = list(read_documents(find_sources([path]), ReadOptions(replace_bad_bytes=True), log))
    assert documents[0].text == bad.decode(errors="replace") and documents[0].utf8 == documents[0].text.encode()
    assert log.replaced == 1 and not log.counts
    assert invalid(path)[0].kind == "invalid_utf8"


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    path, log = write(tmp_path / "a.jsonl", rb'{"text": "a\ud800b \ud83d\ude00"}'), InvalidDocumentLog("replace")
    (document,) = read_documents(find_sources([path]), ReadOptions(replace_bad_bytes=True), log)
    assert document.text == "a\ufffdb \U0001f600" and log.replaced == 1


def test_what_cannot_be_replaced_is_left_out_and_counted(tmp_path):
    path, log = (
        write(tmp_path / "a.jsonl", b'{"text"\n{"body": "\xff"}\n{"text": "a"}\n'),
        InvalidDocumentLog("replace"),
    )
    (document,) = read_documents(find_sources([path]), ReadOptions(replace_bad_bytes=True), log)
    assert document.text == "a" and log.counts == {"broken_json": 1, "missing_text": 1} and log.replaced == 0
