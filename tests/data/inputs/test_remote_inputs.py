"""Inputs through fsspec: the same documents as from files, and one clear error for what is not there."""

from __future__ import annotations

import os
import zipfile

import pytest
from text_helpers import DOCUMENTS, numbered_documents, train, write_jsonl

from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.errors import UserError

pytest.importorskip("fsspec")


@pytest.fixture
def corpus(tmp_path):
    """Two jsonl files, and an archive that holds the same."""
    texts = [*DOCUMENTS, *numbered_documents(80)]
    files = [write_jsonl(tmp_path / f"{n}.jsonl", texts[n::2]) for n in range(2)]
    with zipfile.ZipFile(tmp_path / "corpus.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            archive.write(path, path.name)
    return files


def written(folder, model, patterns):
    folder.mkdir()
    with open(os.devnull, "w") as quiet:
        preprocess(PreprocessSettings(find_sources(patterns), model, folder / "out"), quiet)
    return (folder / "out.bin").read_bytes(), (folder / "out.idx").read_bytes()


@pytest.mark.parametrize("url", ["file://{}/*.jsonl", "zip://*.jsonl::{}/corpus.zip"], ids=["file", "zip"])
def test_a_store_gives_the_documents_of_the_files(tmp_path, corpus, url):
    (tmp_path / "tokenizer").mkdir()
    model = train(tmp_path / "tokenizer", "sentencepiece")
    expected = written(tmp_path / "files", model, corpus)
    assert written(tmp_path / "url", model, [url.format(tmp_path)]) == expected


def test_parquet_in_a_store(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "tokenizer").mkdir()
    model = train(tmp_path / "tokenizer", "sentencepiece")
    parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "a.parquet")
    with zipfile.ZipFile(tmp_path / "corpus.zip", "w") as archive:
        archive.write(tmp_path / "a.parquet", "a.parquet")
    expected = written(tmp_path / "file", model, [tmp_path / "a.parquet"])
    assert written(tmp_path / "url", model, [f"zip://a.parquet::{tmp_path}/corpus.zip"]) == expected


def test_a_remote_input_is_known_by_size_and_version(tmp_path, corpus):
    (source,) = find_sources([f"file://{corpus[0]}"])
    name, size, version = source.identity()
    assert (name, size) == (f"file://{corpus[0]}", corpus[0].stat().st_size) and source.size == size
    os.utime(corpus[0], (1, 1))
    assert source.identity() != [name, size, version]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("file://{}/none-*.jsonl", "matches no file"),
        ("zip://a.jsonl::{}/none.zip", "cannot be read"),
        ("nosuch://bucket/a.jsonl", "cannot be read: Protocol not known"),
    ],
)
def test_what_is_not_there_is_one_clear_error(tmp_path, url, problem):
    with pytest.raises(UserError, match=problem):
        find_sources([url.format(tmp_path)])
