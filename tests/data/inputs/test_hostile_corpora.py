"""Whatever a corpus holds, it is read, left out and counted, or refused in one message, in bounded time and memory."""

from __future__ import annotations

import io
import json
import os
import threading
import time
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hostile import EXAMPLES, for_each_damage, refused
from pyarrow import parquet
from text_helpers import COMPRESS, DOCUMENTS, numbered_documents, train, write_jsonl

from megachiar.data.inputs import pipe
from megachiar.data.inputs.documents import InvalidDocumentLog, ReadOptions
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.inputs.readers import read_documents
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.storage.manifest import read_manifest
from megachiar.errors import UserError

pytestmark = pytest.mark.timeout(60)
TEXTS = [*numbered_documents(20), *DOCUMENTS]
TELLS_DAMAGE = (".jsonl.gz", ".jsonl.xz", ".jsonl.bz2")
"""Compressions with a checksum of their own; that of Zstandard is optional, and its Python library writes none."""


def read(path: Path, format: str | None = None) -> tuple[list[str], InvalidDocumentLog]:
    """Return the usable texts of a file, and what was left out."""
    log = InvalidDocumentLog("skip")
    return [document.text for document in read_documents(find_sources([path], format), ReadOptions(), log)], log


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """The same documents in each format, by suffix."""
    folder = tmp_path_factory.mktemp("corpora")
    contents = {}
    for suffix in (".jsonl", *(f".jsonl{ending}" for ending in COMPRESS)):
        contents[suffix] = write_jsonl(folder / f"a{suffix}", TEXTS).read_bytes()
    parquet.write_table(
        pyarrow.table({"text": TEXTS}), folder / "a.parquet", row_group_size=10, write_page_checksum=True
    )
    return {**contents, ".parquet": (folder / "a.parquet").read_bytes()}


@EXAMPLES
@pytest.mark.parametrize("suffix", [".jsonl", *(f".jsonl{ending}" for ending in COMPRESS), ".parquet"])
def test_damage_is_read_counted_or_refused(files, tmp_path, suffix, examples):
    path, content = tmp_path / f"a{suffix}", files[suffix]

    def check(damaged: bytes) -> None:
        path.write_bytes(damaged)
        found: list[list[str]] = []
        if refused(lambda: found.append(read(path)[0])) is None and suffix in TELLS_DAMAGE:
            assert found == [TEXTS] or (found == [[]] and damaged == b"")

    for_each_damage(content, check, examples)


INVALID = {
    "broken UTF-8": (b'{"text": "\xff"}', "invalid_utf8"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "invalid_utf8"),
    "half a pair as a key": (b'{"\\ud800": "x"}', "missing_text"),
    "zeros": (b"\0" * 100, "broken_json"),
    "a number of many digits": (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "broken_json"),
    "brackets": (b'{"text": "x", "n": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "broken_json"),
    "no object": (b"[1]", "not_an_object"),
    "null": (b"null", "not_an_object"),
    "not a number": (b'{"text": NaN}', "not_a_string"),
    "a number": (b'{"text": 1}', "not_a_string"),
    "only spaces": (b'{"text": " \\n"}', "empty"),
}


@pytest.mark.parametrize("what", INVALID)
def test_a_line_that_is_no_document_is_left_out_and_counted(tmp_path, what):
    line, kind = INVALID[what]
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    texts, log = read(path)
    assert texts == TEXTS * 2 and dict(log.counts) == {kind: 1}
    json.dumps(log.examples, ensure_ascii=False).encode()  # as the journal stores it
    error = refused(lambda: list(read_documents(find_sources([path]), ReadOptions(), InvalidDocumentLog("refuse"))))
    assert error is not None and f"a.jsonl:{len(TEXTS) + 1} (byte " in error.where


@pytest.mark.parametrize("ending", ["", *COMPRESS])
def test_a_line_without_end_is_refused_in_bounded_memory(tmp_path, ending):
    """A small file that decompresses to gigabytes would else take as many."""
    size = 400 << 20
    path = tmp_path / f"a.jsonl{ending}"
    if ending == ".zst":
        path.write_bytes(zstandard.compress(bytes(size)))
    elif ending:
        block = COMPRESS[ending](b"a" * (size // 8))
        path.write_bytes(block * 8)
    else:
        path.touch()
        os.truncate(path, size)
    tracemalloc.start()
    try:
        error = refused(lambda: read(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error is not None and "or more; documents may have 64 MiB" in error.problem
    assert peak < size


def test_a_pipe_without_a_writer_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(pipe, "WAIT_FOR_WRITER_S", 0.3)
    for suffix, problem in ((".jsonl", "no program has opened"), (".parquet", "it is a fifo, not a regular file")):
        os.mkfifo(tmp_path / f"a{suffix}")
        error = refused(lambda suffix=suffix: read(tmp_path / f"a{suffix}"))
        assert error is not None and problem in error.problem


def test_a_pipe_is_read_to_its_end_once_a_program_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(pipe, "WAIT_FOR_WRITER_S", 0.2)
    path, content = tmp_path / "a.jsonl", write_jsonl(tmp_path / "b.jsonl", TEXTS).read_bytes()
    os.mkfifo(path)
    assert not find_sources([path])[0].can_be_read_again

    def write() -> None:
        with open(path, "wb") as file:
            time.sleep(0.6)  # a writer that is there and silent is waited for
            file.write(content)

    writer = threading.Thread(target=write)
    writer.start()
    assert read(path)[0] == TEXTS
    writer.join()


def test_a_folder_is_read_without_its_pipes_devices_and_loops(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    write_jsonl(folder / "inner" / "a.jsonl", TEXTS)
    os.mkfifo(folder / "b.jsonl")
    (folder / "c.jsonl").symlink_to("/dev/zero")
    (folder / "inner" / "up").symlink_to(folder)
    assert read(folder)[0] == TEXTS
    (folder / "d.jsonl").symlink_to("d.jsonl")
    with pytest.raises(UserError, match="a broken link"):
        read(folder)


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero"])
def test_a_device_ends_in_one_message(name):
    for format in ("jsonl", "txt"):
        log = InvalidDocumentLog("refuse")
        sources = find_sources([name], format)
        error = refused(lambda sources=sources, log=log: list(read_documents(sources, ReadOptions(), log)))
        assert error is not None or (name, format) == ("/dev/null", "jsonl")


def test_a_name_that_is_no_utf8_is_written_down_and_found_again(tmp_path):
    model = train(tmp_path, "sentencepiece")
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.jsonl")
    write_jsonl(tmp_path / "a.jsonl", TEXTS).rename(name)
    settings = PreprocessSettings(find_sources([name]), model, tmp_path / "out")
    preprocess(settings, io.StringIO())
    assert read_manifest(tmp_path / "out").sources == [rf"{tmp_path}/\xff\xfe.jsonl"]
    assert preprocess(settings, io.StringIO()).existed
