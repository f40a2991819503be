"""Inputs with new times and the same text are unchanged inputs; other text is another input, whatever its times say."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from text_helpers import numbered_documents, train, write_jsonl, write_other_text

from megachiar.data.inputs import compression, parquet_reader
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing import journal as journals
from megachiar.data.preprocessing import run as runs
from megachiar.data.preprocessing import source_records
from megachiar.data.preprocessing.merge import find_merged, merge_datasets
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.report import Report
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.shards import make_shard, merge_shards
from megachiar.data.preprocessing.split import Split
from megachiar.data.preprocessing.tokenizer_training import TrainingSettings, train_tokenizer
from megachiar.data.storage.manifest import read_manifest
from megachiar.errors import UserError

LATER, EARLIER = 4 * 10**18, 10**18  # times in nanoseconds: of the year 2096, and of 2001
CHANGED = "was changed since"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer"), "huggingface")


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    """A file of each format, and one without text."""
    documents = numbered_documents(90)
    write_jsonl(tmp_path / "a.jsonl", documents[:30])
    write_jsonl(tmp_path / "b.jsonl.gz", documents[30:60])
    parquet.write_table(
        pyarrow.table({"text": documents[60:] + [None, ""]}), tmp_path / "c.parquet", compression="none"
    )
    (tmp_path / "d.jsonl").touch()
    return sorted(tmp_path.glob("[abcd].*"))


def settings_of(tokenizer: Path, corpus: list[Path], **changes: object) -> PreprocessSettings:
    values = {"output_prefix": corpus[0].parent / "out", "append_eod": True, "on_error": "skip", **changes}
    return PreprocessSettings(find_sources(corpus), tokenizer, **values)


def quietly(settings: PreprocessSettings) -> Report:
    return preprocess(settings, io.StringIO())


def touch(paths: list[Path], time: int) -> None:
    """Write each file anew, as ``git checkout`` and ``cp`` do, and give it another time."""
    for path in paths:
        shutil.copy(path, f"{path}.new")
        os.replace(f"{path}.new", path)
        os.utime(path, ns=(time, time))


def write_other_rows(path: Path) -> None:
    """Write a parquet file of the same size with other text."""
    size, texts = path.stat().st_size, parquet.read_table(path).column("text").to_pylist()
    texts[3] = texts[3].replace("Document", "Dokument")
    parquet.write_table(pyarrow.table({"text": texts}), path, compression="none")
    assert path.stat().st_size == size


def write_other_member(path: Path) -> None:
    """Write a gzip file of the same size with other text: another time stands in its head."""
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()).replace(b"Document", b"Dokument", 1)))


@pytest.mark.parametrize("time", [LATER, EARLIER])
def test_new_times_are_nothing_to_do(tokenizer, corpus, time):
    settings = settings_of(tokenizer, corpus, split=Split.parse("train=3,valid=1"))
    assert not quietly(settings).existed
    touch(corpus, time)
    assert quietly(settings).existed


@pytest.mark.parametrize("time", [LATER, EARLIER])
@pytest.mark.parametrize(
    ("name", "change"),
    [("a.jsonl", write_other_text), ("b.jsonl.gz", write_other_member), ("c.parquet", write_other_rows)],
)
def test_another_text_is_another_input_whatever_its_time(tokenizer, corpus, name, change, time):
    quietly(settings_of(tokenizer, corpus))
    changed = corpus[0].parent / name
    change(changed)
    os.utime(changed, ns=(time, time))
    with pytest.raises(UserError, match=f"{name} {CHANGED}"):
        quietly(settings_of(tokenizer, corpus))


def test_sizes_and_checksums_stand_in_the_manifest_and_do_not_depend_on_times(tokenizer, corpus):
    quietly(settings_of(tokenizer, corpus))
    manifest = read_manifest(corpus[0].parent / "out")
    assert manifest.source_bytes == [path.stat().st_size for path in corpus]
    assert len(set(manifest.source_checksums)) == len(corpus), "each text has its own"
    touch(corpus, EARLIER)
    quietly(settings_of(tokenizer, corpus, overwrite=True))
    assert read_manifest(corpus[0].parent / "out") == manifest


def test_each_input_is_read_once_and_only_a_touched_one_again(tokenizer, corpus, monkeypatch):
    read: list[str] = []

    def note(real):
        return lambda source, *rest: read.append(source.path.name) or real(source, *rest)

    monkeypatch.setattr(compression, "raw_blocks", note(compression.raw_blocks))
    monkeypatch.setattr(source_records, "raw_blocks", note(source_records.raw_blocks))
    monkeypatch.setattr(parquet_reader, "chunks_of_batches", note(parquet_reader.chunks_of_batches))
    quietly(settings_of(tokenizer, corpus))
    assert sorted(read) == [path.name for path in corpus]
    read.clear()
    assert quietly(settings_of(tokenizer, corpus)).existed and read == []
    touch(corpus[1:3], LATER)
    assert quietly(settings_of(tokenizer, corpus)).existed and read == ["b.jsonl.gz", "c.parquet"]


def copy_over(files: list[Path]) -> None:
    """Give the files of an output the newest of times, as ``cp -r`` gives the copies that it makes."""
    for path in files:
        shutil.copy(path, f"{path}.copy")
        os.replace(f"{path}.copy", path)
        os.utime(path, ns=(LATER, LATER))


def outputs(corpus: list[Path]) -> list[Path]:
    return sorted(corpus[0].parent.glob("out.*"))


@pytest.mark.parametrize("has_note", [True, False])
@pytest.mark.parametrize("time", [LATER, EARLIER])
def test_a_copied_or_touched_dataset_is_not_the_one_of_a_text_that_was_changed_before(
    tokenizer, corpus, has_note, time
):
    quietly(settings_of(tokenizer, corpus))
    write_other_text(corpus[0])
    os.utime(corpus[0], ns=(time, time))
    copy_over(outputs(corpus))
    if not has_note:
        (corpus[0].parent / "out.inputs").unlink()
    with pytest.raises(UserError, match=rf"a\.jsonl {CHANGED}"):
        quietly(settings_of(tokenizer, corpus))


@pytest.mark.parametrize("note", ["", "{", '{"inputs": 1}', '{"inputs": 2, "records": []}', "[]"])
def test_a_dataset_whose_note_is_not_readable_is_compared_with_its_inputs(tokenizer, corpus, note):
    quietly(settings_of(tokenizer, corpus))
    (corpus[0].parent / "out.inputs").write_text(note)
    assert quietly(settings_of(tokenizer, corpus)).existed
    write_other_text(corpus[0])
    with pytest.raises(UserError, match=rf"a\.jsonl {CHANGED}"):
        quietly(settings_of(tokenizer, corpus))


def test_an_input_that_was_changed_while_the_dataset_was_written_is_another_one(tokenizer, corpus, monkeypatch):
    real = runs.PreprocessRun._check_filled

    def check_filled(self: runs.PreprocessRun, *arguments: object) -> None:
        """Change an input when all inputs are read and no manifest is written."""
        write_other_text(corpus[0])
        os.utime(corpus[0], ns=(EARLIER, EARLIER))
        real(self, *arguments)
        time.sleep(0.05)  # the clock of files is coarse

    monkeypatch.setattr(runs.PreprocessRun, "_check_filled", check_filled)
    assert not quietly(settings_of(tokenizer, corpus)).existed
    with pytest.raises(UserError, match=rf"a\.jsonl {CHANGED}"):
        quietly(settings_of(tokenizer, corpus))


def test_the_note_of_another_text_proves_nothing(tokenizer, corpus):
    folder = corpus[0].parent
    quietly(settings_of(tokenizer, corpus))
    write_other_text(corpus[0])
    quietly(settings_of(tokenizer, corpus, output_prefix=folder / "other"))
    shutil.copy(folder / "other.inputs", folder / "out.inputs")
    with pytest.raises(UserError, match=rf"a\.jsonl {CHANGED}"):
        quietly(settings_of(tokenizer, corpus))


def test_a_manifest_without_checksums_proves_nothing(tokenizer, corpus):
    quietly(settings_of(tokenizer, corpus))
    path = corpus[0].parent / "out.json"
    values = json.loads(path.read_bytes())
    del values["source_bytes"], values["source_checksums"], values["parts"], values["seal"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="earlier version, which recorded nothing that tells"):
        quietly(settings_of(tokenizer, corpus))


class Stop(Exception):
    """Stands for whatever ends a run."""


def stop_before_the_end(settings: PreprocessSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end after all inputs were recorded in its journal."""
    with monkeypatch.context() as patch:
        patch.setattr(runs.PreprocessRun, "_move_outputs", lambda self: (_ for _ in ()).throw(Stop))
        with contextlib.suppress(Stop):
            quietly(settings)


@pytest.mark.parametrize("earlier_version", [False, True])
def test_an_unfinished_run_goes_on_after_new_times_and_not_after_new_text(
    tokenizer, corpus, monkeypatch, earlier_version
):
    settings = settings_of(tokenizer, corpus, shuffle_seed=3)
    stop_before_the_end(settings, monkeypatch)
    journal = corpus[0].parent / "out.journal"
    if earlier_version:
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        for line in lines:
            del line["seal"]
        for line in lines[1:]:
            line["sources"] = [[n, size, os.stat(n).st_mtime_ns] for n, size, *_ in line["sources"]]
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert journals.Journal.open(journal, lines[0]).check_sources(settings.sources, "text") is None
    touch(corpus, LATER)
    write_other_text(corpus[0])
    with pytest.raises(UserError, match=rf"a\.jsonl as input 1, but input .*a\.jsonl {CHANGED}"):
        quietly(settings)
    if earlier_version:
        return
    corpus[0].write_bytes(write_jsonl(corpus[0], numbered_documents(30)).read_bytes())
    report = quietly(settings)
    assert not report.existed and not journal.exists()


def test_shards_are_made_and_merged_after_new_times_and_not_after_new_text(tokenizer, corpus):
    settings = settings_of(tokenizer, corpus)
    assert make_shard(settings, 0, 2, io.StringIO()) is not None
    touch(corpus, LATER)
    assert make_shard(settings, 0, 2, io.StringIO()) is None, "it is whole"
    assert make_shard(settings, 1, 2, io.StringIO()) is not None
    write_other_text(corpus[0])
    with pytest.raises(UserError, match="shard 0 of 2 was made by another call, or its inputs were changed since"):
        merge_shards(settings, 2)
    assert make_shard(settings, 0, 2, io.StringIO()) is not None
    touch(corpus, EARLIER)
    merge_shards(settings, 2)
    assert quietly(settings).existed, "the manifest of the merged dataset has the checksums of all shards"
    touch(corpus, LATER)
    assert quietly(settings).existed


def test_a_tokenizer_is_kept_after_new_times_and_not_after_new_text(corpus):
    settings = TrainingSettings(find_sources(corpus), corpus[0].parent / "t.json", 290, "huggingface", on_error="skip")
    train_tokenizer(settings, io.StringIO())
    touch(corpus, LATER)
    assert train_tokenizer(settings, io.StringIO()).existed
    write_other_rows(corpus[2])
    with pytest.raises(UserError, match=rf"c\.parquet {CHANGED}"):
        train_tokenizer(settings, io.StringIO())


def test_a_merged_dataset_is_kept_after_new_times_and_not_after_new_tokens(tokenizer, corpus):
    folder = corpus[0].parent
    inputs = [folder / "one", folder / "two"]
    for prefix, sources in zip(inputs, (corpus[:2], corpus[2:]), strict=True):
        quietly(settings_of(tokenizer, sources, output_prefix=prefix))
    merge_datasets(inputs, folder / "both")
    made = find_merged(inputs, folder / "both", None)
    assert made.source_checksums and len(made.source_checksums) == len(made.sources) == len(corpus)
    touch([Path(f"{prefix}{suffix}") for prefix in inputs for suffix in (".bin", ".idx", ".json")], LATER)
    assert find_merged(inputs, folder / "both", None) == made
    tokens = folder / "two.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\1\0")
    os.utime(tokens, ns=(EARLIER, EARLIER))
    with pytest.raises(Exception, match=rf"two\.bin {CHANGED}"):
        find_merged(inputs, folder / "both", None)


def test_a_copied_merged_dataset_is_not_the_one_of_tokens_that_were_changed_before(tokenizer, corpus):
    folder = corpus[0].parent
    inputs = [folder / "one", folder / "two"]
    for prefix, sources in zip(inputs, (corpus[:2], corpus[2:]), strict=True):
        quietly(settings_of(tokenizer, sources, output_prefix=prefix))
    merge_datasets(inputs, folder / "both")
    tokens = folder / "two.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\1\0")
    copy_over(sorted(folder.glob("both.*")))
    with pytest.raises(Exception, match=rf"two\.bin {CHANGED}"):
        find_merged(inputs, folder / "both", None)
