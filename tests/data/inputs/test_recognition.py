"""Files that are not what their name says are recognised, and the commands in the remedies do what they promise."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from text_helpers import COMPRESS, DOCUMENTS, numbered_documents, write_jsonl

from megachiar.data.inputs.documents import InvalidDocumentLog, ReadOptions
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.inputs.readers import read_documents
from megachiar.data.inputs.recognition import describe, encoding_of, json_layout
from megachiar.errors import UserError

TEXTS = DOCUMENTS + numbered_documents(30)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><body>404</body></html>"
JAPANESE = "吾輩は猫である。名前はまだ無い。\nどこで生れたかとんと見当がつかぬ。\n一二三\n" * 20


def read(path: Path, format: str | None = None, **options) -> list[str]:
    sources = find_sources([path], format)
    return [document.text for document in read_documents(sources, ReadOptions(**options), InvalidDocumentLog())]


def refused(path: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.where == str(path)
    return caught.value


def follow(error: UserError) -> Path:
    """Run the command that the remedy names; the file that it writes."""
    command = re.search("`(.*)`", error.remedy)[1]
    for program in re.findall(r"^\w+|(?<=\| )\w+", command):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    subprocess.run(command, shell=True, check=True)
    return Path(command.rpartition("> ")[2].strip("'"))


def archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        made.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


FALSE = {  # named: gzip writes the time into its bytes, and parallel workers must collect the same names
    "gzip data": COMPRESS[".gz"](b"x"),
    "Zstandard data": COMPRESS[".zst"](b"x"),
    "xz data": COMPRESS[".xz"](b"x"),
    "bzip2 data": COMPRESS[".bz2"](b"x"),
    "a parquet file": b"PAR1...",
    "a zip archive": b"PK\x03\x04\x14\x00",
    "a tar archive": archive(),
    "an Arrow file": b"ARROW1\x00\x00\xff\xff\xff\xff",
}


@pytest.mark.parametrize("what", FALSE)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_under_a_false_name_is_recognised(tmp_path, name, what):
    (tmp_path / name).write_bytes(FALSE[what])
    assert refused(tmp_path / name).problem == f"is {what}, but was to be read as {name[2:]}"


CALLED = {"gz": "gzip", "zst": "Zstandard", "xz": "xz", "bz2": "bzip2"}


@pytest.mark.parametrize("suffix", CALLED)
@pytest.mark.parametrize(
    ("content", "what", "remedy"),
    [
        (b"this is not compressed at all, and long enough to tell", "plain text", "take .SUFFIX off its name"),
        (b'{"text": "a"}\n', "plain text", "take .SUFFIX off its name"),
        (LFS, None, "git lfs pull"),
        (PAGE, "a web page", "fetch it again: what came may be a message of the server"),
        (b"\x00\x01\x02\x03 and so on", "something that begins with", "fetch it again"),
        (b"PAR1...", "a parquet file", "fetch it again"),
    ],
    ids=["text", "json", "lfs", "page", "bytes", "parquet"],
)
def test_a_compressed_file_that_is_none_is_named(tmp_path, suffix, content, what, remedy):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(content)
    error = refused(path)
    expected = "is a pointer of git-LFS" if what is None else f"is not {CALLED[suffix]} data, but {what}"
    assert error.problem.startswith(expected)
    assert remedy.replace("SUFFIX", suffix) in error.remedy


@pytest.mark.parametrize("suffix", CALLED)
@pytest.mark.parametrize("other", CALLED)
def test_one_compression_under_the_name_of_another_is_named(tmp_path, suffix, other):
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(COMPRESS[f".{other}"](b'{"text": "a"}\n'))
    if suffix == other:
        assert read(path) == ["a"]
        return
    error = refused(path)
    assert error.problem == f"is not {CALLED[suffix]} data, but {CALLED[other]} data"
    assert error.remedy == f"put .{other} in place of .{suffix}"
    assert read(path.rename(tmp_path / f"a.jsonl.{other}")) == ["a"]


def test_a_pipe_is_told_the_format_that_reads_it(tmp_path, monkeypatch):
    class Pipe:
        buffer = io.BytesIO(COMPRESS[".zst"](b'{"text": "a"}\n'))

    monkeypatch.setattr("sys.stdin", Pipe)
    with pytest.raises(UserError, match="standard input: is not gzip data, but Zstandard data") as caught:
        read("-", "jsonl.gz")
    assert caught.value.remedy == "pass --format jsonl.zst"
    Pipe.buffer = io.BytesIO(b'{"text": "a"}\n')
    with pytest.raises(UserError, match="plain text") as caught:
        read("-", "jsonl.gz")
    assert caught.value.remedy == "pass --format jsonl"


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_pointers_of_git_lfs_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(LFS)
    error = refused(tmp_path / name)
    assert error.problem == "is a pointer of git-LFS, not the file itself" and "git lfs pull" in error.remedy


def test_other_data_under_the_name_of_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(COMPRESS[".gz"](b"x"))
    assert refused(tmp_path / "a.parquet").problem == "is not a parquet file, but gzip data"


def test_a_page_of_a_server_is_no_json_but_may_be_text(tmp_path):
    for name in ("a.jsonl", "a.txt"):
        (tmp_path / name).write_bytes(PAGE)
    assert refused(tmp_path / "a.jsonl").problem == "is a web page, but was to be read as jsonl"
    assert read(tmp_path / "a.txt") == [PAGE.decode()]


# --- encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    "text", ["\n".join(TEXTS), JAPANESE, "Ünïcödé ß\n" * 9], ids=["english", "japanese", "umlauts"]
)
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_utf16_is_named_and_converted_by_the_command(tmp_path, encoding, text, suffix):
    if encoding == "utf-32" and text == JAPANESE:
        text = "a" + text
    content = text.encode(encoding)
    path = tmp_path / f"a b{suffix}"
    path.write_bytes(COMPRESS[".gz"](content) if suffix.endswith("gz") else content)
    error = refused(path)
    assert re.match(r"is UTF-(16|16LE|16BE|32) text, but text must be UTF-8", error.problem)
    assert read(follow(error)) == [text]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_json_lines_in_utf16_are_named(tmp_path, encoding):
    content = write_jsonl(tmp_path / "a.jsonl", TEXTS).read_text().encode(encoding)
    (tmp_path / "a.jsonl").write_bytes(content)
    assert read(follow(refused(tmp_path / "a.jsonl"))) == TEXTS


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(TEXTS).encode(),  # with a NUL in it
        JAPANESE.encode(),
        b"a\0b\0c\0" + b"plain text " * 20,
        bytes(range(256)) * 16,
        b"\xff" * 50 + bytes(50),
        "naïve café \0".encode("latin-1") * 20,
        JAPANESE.encode("shift-jis") + b"\0",
        b"\0" * 4096,
        b"",
        b"a",
    ],
)
def test_other_bytes_are_not_taken_for_utf16(content):
    assert encoding_of(content[:4096]) is None


def test_text_that_begins_like_a_magic_number_is_text():
    for text in (b"BZh is a word", b"ARROW1 is another", b"<htmlish", b"7zip", b"PK is short"):
        assert describe(text) is None


# --- JSON that is not an object a line --------------------------------------------------------------------------------

RECORDS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
ARRAYS = {
    "compact": json.dumps(RECORDS),
    "pretty": json.dumps(RECORDS, indent=2),
    "by line": "[\n" + ",\n".join(json.dumps(record) for record in RECORDS) + "\n]\n",
    "from the first line": "[" + ",\n".join(json.dumps(record) for record in RECORDS) + "]",
}
PRETTY = {
    "indented": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
    "hanging": "".join(json.dumps(record)[:-1].replace(', "text"', ',\n "text"') + "}\n" for record in RECORDS),
}


@pytest.mark.parametrize("name", ["a.json", "it's a.jsonl", "a.jsonl.gz", "a.json.xz"])
@pytest.mark.parametrize("layout", PRETTY)
def test_other_json_is_named_and_converted_by_the_command(tmp_path, name, layout):
    path = tmp_path / name
    content = PRETTY[layout].encode()
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
    error = refused(path)
    assert error.problem.startswith("is pretty-printed JSON")
    command = re.search("`(.*)`", error.remedy)[1]
    if shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    subprocess.run(command, shell=True, check=True)
    (made,) = tmp_path.glob("*.lines.jsonl")
    assert read(made) == TEXTS


@pytest.mark.parametrize("name", ["a.json", "it's a.jsonl", "a.jsonl.gz", "a.json.xz"])
@pytest.mark.parametrize("layout", ARRAYS)
def test_an_array_is_read_whatever_its_layout(tmp_path, name, layout):
    path = tmp_path / name
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(ARRAYS[layout].encode()))
    assert read(path) == TEXTS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"text": "a"}', "lines"),
        (b'\n\n{"text": "a"}\r\n{"text": "b"}', "lines"),
        (b'{"text": "a"\n{"text": "b"}\n', "lines"),  # a broken first line alone
        (b'{"text": \n{"text": "b"}\n', "lines"),
        (b'["a"]\n{"text": "b"}\n', "lines"),
        (b"text", "other"),
        (b'["a", "b"]', "other"),
        (b"[]", "other"),
        (b"[[1], [2]]", "array"),
        (b'[{"text": "a', "array"),
        (b'{\n}\n{\n"a": 1}', "pretty-printed"),
    ],
)
def test_the_layout_of_json_is_told_by_its_beginning(content, expected):
    assert json_layout(content) == expected


def test_a_broken_first_line_is_still_a_document_that_can_be_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'["a"]\n{"text": "b"}\n')
    log = InvalidDocumentLog("skip")
    documents = list(read_documents(find_sources([tmp_path / "a.jsonl"]), ReadOptions(), log))
    assert [document.text for document in documents] == ["b"] and log.counts == {"not_an_object": 1}
