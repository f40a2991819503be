"""Labelled documents, pairs of texts and ready-made ids: each document keeps its label however it was preprocessed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hostile import refused
from pyarrow import parquet
from text_helpers import run_tool

from megachiar.cli import preprocess as command
from megachiar.data.inputs import chunk_groups
from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing import journal
from megachiar.data.preprocessing.classes import MOST_FOUND, ClassTable, class_of
from megachiar.data.preprocessing.merge import find_merged, merge_datasets
from megachiar.data.preprocessing.plain_tokenizers import byte_tokenizer
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.preprocessing.shards import make_shard, merge_shards
from megachiar.data.preprocessing.split import Split
from megachiar.data.storage.files import labels_path
from megachiar.data.storage.labels import read_labels
from megachiar.data.storage.manifest import check_manifest, read_manifest
from megachiar.data.storage.reader import IndexedDataset
from megachiar.errors import UserError

SEPARATOR = 256
NAMES = ("zebra", "apple", "mango", "Äpfel")


def examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts that differ from each other, each with a label that no part of the text tells."""
    rng = random.Random(seed)
    return [
        {"text": f"{seed}/{number} " + "ab " * rng.randint(0, 9), "label": rng.choice(NAMES)} for number in range(count)
    ]


def write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "bytes.json"
    path.write_bytes(byte_tokenizer())
    return path


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    """Six files, in the first of which not every class occurs."""
    counts = (3, 20, 0, 45, 1, 17)
    return [write(tmp_path / f"in_{n}.jsonl", examples(count, n)) for n, count in enumerate(counts)]


def prepare(output: Path, tokenizer: Path | None, inputs: Sequence[Path], **changes: Any) -> PreprocessSettings:
    keys = {key: changes.pop(key) for key in ("text_key", "second_text_key", "token_key") if key in changes}
    read = ReadOptions(label_key=changes.pop("label_key", "label"), chunk_bytes=500, **keys)
    return PreprocessSettings(find_sources(inputs), tokenizer, output, read=read, **changes)


def run(settings: PreprocessSettings):
    return preprocess(settings, io.StringIO())


def content_of(prefix: Path) -> list[tuple[list[int], str]]:
    """Return ids and class of each document, the labels as numpy reads them."""
    dataset = IndexedDataset(prefix)
    numbers = np.load(f"{prefix}.labels.npy", allow_pickle=False)
    names = json.loads(Path(f"{prefix}.json").read_text())["labels"]["classes"]
    assert numbers.size == dataset.documents and numbers.dtype == np.int32
    return [(dataset.document(n).tolist(), names[number]) for n, number in enumerate(numbers.tolist())]


def expected(files: Sequence[Path]) -> list[tuple[list[int], str]]:
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [(list(record["text"].encode()), str(record["label"])) for record in records]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".inputs"}


# --- labels follow their documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_each_document_has_its_label(tmp_path, tokenizer, corpus, workers):
    report = run(prepare(tmp_path / "out", tokenizer, corpus, workers=workers))
    assert content_of(tmp_path / "out") == expected(corpus)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.labels.classes == sorted(NAMES) and not manifest.append_eod
    check_manifest(tmp_path / "out", manifest, verify=True)
    counts = read_labels(tmp_path / "out", manifest, manifest.documents).counts()
    lines = "\n".join(report.lines())
    assert f"4 classes: {', '.join(f'{name} {count}' for name, count in counts.items())}" in lines
    assert "end" not in lines.replace("appended", "").split("engine")[0].split("labels.npy")[1]
    left = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out"))
    assert left == ["out.bin", "out.idx", "out.inputs", "out.json", "out.labels.npy"]


def test_parts_and_a_new_order_keep_labels_beside_their_documents(tmp_path, tokenizer, corpus):
    split = Split.parse("train=2,valid=1")
    run(prepare(tmp_path / "out", tokenizer, corpus, split=split, shuffle_seed=5))
    parts = [content_of(tmp_path / f"out_{name}") for name in ("train", "valid")]
    together = [*parts[0], *parts[1]]
    assert sorted(together) == sorted(expected(corpus)) and all(parts)
    assert together != expected(corpus)
    classes = [read_manifest(tmp_path / f"out_{name}").labels.classes for name in ("train", "valid")]
    assert classes[0] == classes[1] == sorted(NAMES)


def test_parquet_gives_what_jsonl_gives(tmp_path, tokenizer, corpus):
    records = [json.loads(line) for file in corpus for line in file.read_text().splitlines()]
    columns = {"number": range(len(records)), **{key: [record[key] for record in records] for key in ("text", "label")}}
    table = pyarrow.table({key: list(values) for key, values in columns.items()})
    table = table.set_column(2, "label", table["label"].dictionary_encode())
    parquet.write_table(table, tmp_path / "in.parquet")
    run(prepare(tmp_path / "a", tokenizer, corpus))
    settings = prepare(tmp_path / "b", tokenizer, [tmp_path / "in.parquet"])
    run(settings)
    for suffix in (".bin", ".idx", ".labels.npy"):
        assert Path(f"{tmp_path}/a{suffix}").read_bytes() == Path(f"{tmp_path}/b{suffix}").read_bytes()
    assert run(settings).existed
    table = table.set_column(2, "label", [[*table["label"].to_pylist()[:-1], "other"]])
    parquet.write_table(table, tmp_path / "in.parquet")
    error = refused(lambda: run(settings))
    assert error is not None and "in.parquet was changed since" in error.problem


def test_whole_numbers_are_classes_in_the_order_of_their_size(tmp_path, tokenizer):
    records = [{"text": "x", "label": label} for label in (10, 2, "1", -3, 2)]
    run(prepare(tmp_path / "out", tokenizer, [write(tmp_path / "in.jsonl", records)]))
    assert read_manifest(tmp_path / "out").labels.classes == ["-3", "1", "2", "10"]
    assert [name for _, name in content_of(tmp_path / "out")] == ["10", "2", "1", "-3", "2"]


def test_classes_that_are_named_keep_their_order(tmp_path, tokenizer):
    records = [{"text": "x", "label": label} for label in ("pos", "neg", 1, 0)]
    corpus = [write(tmp_path / "in.jsonl", records)]
    run(prepare(tmp_path / "out", tokenizer, corpus, classes=("pos", "neg", "unused")))
    assert np.load(tmp_path / "out.labels.npy").tolist() == [0, 1, 1, 0]
    assert read_manifest(tmp_path / "out").labels.classes == ["pos", "neg", "unused"]


def test_a_number_is_a_place_only_where_no_class_is_called_by_a_number():
    assert class_of(1, ("neg", "pos")) == "pos" and class_of("1", ("neg", "pos")) is None
    assert class_of(1, ("1", "0")) == "1" and class_of(2, ("1", "0")) is None and class_of(1, ("5", "7")) is None
    assert class_of(-1, ("neg", "pos")) is None and class_of(2, ("neg", "pos")) is None
    assert class_of(7, None) == "7"


def test_a_key_that_is_no_class_is_noticed():
    table = ClassTable(None)
    table.numbers_of([f"document {number}" for number in range(MOST_FOUND)])
    with pytest.raises(UserError, match="more than 10,000 labels, such as 'document 0' and 'one more'"):
        table.numbers_of(["one more"])
    assert ClassTable(tuple(f"{n}" for n in range(MOST_FOUND + 1))).numbers_of(["3"]).tolist() == [3]


# --- two texts, ready-made ids ----------------------------------------------------------------------------------------


def test_two_texts_are_joined_by_the_end_of_document_token(tmp_path, tokenizer):
    records = [{"one": "abc", "two": "dé", "label": 1}, {"one": "x", "two": "longer text", "label": 0}]
    corpus = [write(tmp_path / "in.jsonl", records)]
    keys = {"text_key": "one", "second_text_key": "two"}
    report = run(prepare(tmp_path / "out", tokenizer, corpus, **keys))
    assert [ids for ids, _ in content_of(tmp_path / "out")] == [
        [*b"abc", SEPARATOR, *"dé".encode()],
        [*b"x", SEPARATOR, *b"longer text"],
    ]
    assert read_manifest(tmp_path / "out").words == 1 + 1 + 1 + 2
    assert "'<|endoftext|>' (id 256) stands between the two texts" in report.lines()
    run(prepare(tmp_path / "cut", tokenizer, corpus, **keys, max_text_tokens=2))
    assert [ids for ids, _ in content_of(tmp_path / "cut")] == [
        [*b"ab", SEPARATOR, 100, 195],
        [*b"x", SEPARATOR, *b"lo"],
    ]


def test_a_separator_in_the_text_is_text(tmp_path, tokenizer):
    records = [{"one": "<|endoftext|>", "two": "b", "label": 1}]
    run(
        prepare(
            tmp_path / "out", tokenizer, [write(tmp_path / "in.jsonl", records)], text_key="one", second_text_key="two"
        )
    )
    ((ids, _),) = content_of(tmp_path / "out")
    assert ids.count(SEPARATOR) == 1 and ids == [*b"<|endoftext|>", SEPARATOR, *b"b"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_ready_made_ids_need_no_tokenizer(tmp_path, kind):
    records = [{"tokens": [14, 10, 3, 15], "label": 3}, {"tokens": [16], "label": 0}]
    source = write(tmp_path / "in.jsonl", records)
    if kind == "parquet":
        source = tmp_path / "in.parquet"
        parquet.write_table(pyarrow.table({key: [record[key] for record in records] for key in records[0]}), source)
    settings = prepare(tmp_path / "out", None, [source], token_key="tokens", vocab_size=17)
    report = run(settings)
    assert content_of(tmp_path / "out") == [([14, 10, 3, 15], "3"), ([16], "0")]
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.tokenizer.kind, manifest.tokenizer.vocab_size, manifest.text_bytes) == ("ids", 17, 0)
    assert next(iter(report.lines())) == f"{tmp_path / 'out'}.bin/.idx: 2 documents, 5 tokens (uint16)"
    assert run(settings).existed
    error = refused(lambda: run(dataclasses.replace(settings, vocab_size=18)))
    assert error is not None and "tokenizer" in error.problem


def test_ids_without_labels_make_a_dataset_too(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"tokens": [1, 2, 3]}, {"tokens": [70_000]}])
    run(prepare(tmp_path / "out", None, [source], token_key="tokens", vocab_size=70_001, label_key=None))
    dataset = IndexedDataset(tmp_path / "out")
    assert dataset.tokens.tolist() == [1, 2, 3, 70_000] and dataset.dtype == np.int32
    assert not labels_path(tmp_path / "out").exists() and read_manifest(tmp_path / "out").labels is None


def test_examples_of_ids_are_spread_over_the_parts(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"tokens": [n % 7, n], "label": n % 2} for n in range(200)])
    settings = prepare(
        tmp_path / "out", None, [source], token_key="tokens", vocab_size=200, split=Split.parse("a=1,b=1")
    )
    run(settings)
    parts = [content_of(tmp_path / f"out_{name}") for name in "ab"]
    assert min(map(len, parts)) > 70
    assert all(name == str(ids[1] % 2) for part in parts for ids, name in part)


# --- what cannot be used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kind", "problem"),
    [
        ('{"text": "a"}', "missing_label", "has no label: no key 'label'; keys are text"),
        ('{"text": "a", "label": 1.0}', "bad_label", r"is a JSON number \(1.0\), not a string or whole number"),
        ('{"text": "a", "label": true}', "bad_label", "is a JSON true, not"),
        ('{"text": "a", "label": null}', "bad_label", "is a JSON null"),
        ('{"text": "a", "label": [1]}', "bad_label", "is a JSON array"),
        ('{"text": "a", "label": 99999999999999}', "bad_label", "not a string or whole number"),
        ('{"text": "a", "label": " "}', "bad_label", "empty or not printable"),
        ('{"text": "a", "label": "x\\ny"}', "bad_label", "empty or not printable"),
        ('{"text": " ", "label": 1}', "empty", "is empty"),
        ('{"label": 1}', "missing_text", "has no key 'text'; keys are label"),
    ],
)
def test_an_example_that_cannot_be_used_is_named(tmp_path, tokenizer, line, kind, problem):
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"text": "good", "label": "x"}}\n{line}\n')
    with pytest.raises(UserError, match=problem) as caught:
        run(prepare(tmp_path / "out", tokenizer, [path]))
    assert caught.value.where == f"{path}:2 (byte 31)" and f"[{kind}]" in caught.value.problem
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]
    report = run(prepare(tmp_path / "out", tokenizer, [path], on_error="skip"))
    assert report.log.counts == {kind: 1} and content_of(tmp_path / "out") == [([*b"good"], "x")]


@pytest.mark.parametrize(
    ("tokens", "kind", "problem"),
    [
        ("[]", "empty", "is empty"),
        ("[1, -1]", "bad_tokens", r"'tokens'\[1\] is -1, not a whole number"),
        ("[1, 2.0]", "bad_tokens", r"'tokens'\[1\] is 2.0"),
        ("[true]", "bad_tokens", r"'tokens'\[0\] is True"),
        ("[99999999999]", "bad_tokens", "is 99999999999, not a whole number from 0"),
        ("[3, 17]", "bad_tokens", "id 17 at place 1 is not below --vocab-size 17"),
        ('"1 2"', "bad_tokens", "is a JSON string, not an array of ids"),
    ],
)
def test_ids_that_cannot_be_used_are_named(tmp_path, tokens, kind, problem):
    path = tmp_path / "in.jsonl"
    path.write_text(f'{{"tokens": {tokens}, "label": 1}}\n')
    with pytest.raises(UserError, match=problem) as caught:
        run(prepare(tmp_path / "out", None, [path], token_key="tokens", vocab_size=17))
    assert caught.value.where.startswith(f"{path}:1") and f"[{kind}]" in caught.value.problem


def test_a_label_that_is_none_of_the_named_classes_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "in.jsonl", [{"text": "a", "label": "maybe"}])
    with pytest.raises(UserError, match=r"label 'maybe' is no class: these are yes, no \[unknown_class\]"):
        run(prepare(tmp_path / "out", tokenizer, [path], classes=("yes", "no")))


@pytest.mark.parametrize("key", ["one", "two"])
def test_both_texts_must_be_there(tmp_path, tokenizer, key):
    record = {"one": "a", "two": "b", "label": 1}
    for value, problem in ((None, f"'{key}' is a JSON null"), ("", f"'{key}' is empty")):
        path = write(tmp_path / "in.jsonl", [{**record, key: value}])
        with pytest.raises(UserError, match=problem):
            run(prepare(tmp_path / "out", tokenizer, [path], text_key="one", second_text_key="two"))
    path = write(tmp_path / "in.jsonl", [{other: value for other, value in record.items() if other != key}])
    with pytest.raises(UserError, match=f"has no key '{key}'"):
        run(prepare(tmp_path / "out", tokenizer, [path], text_key="one", second_text_key="two"))


def test_a_parquet_file_without_the_column_is_refused(tmp_path, tokenizer):
    parquet.write_table(pyarrow.table({"text": ["a"], "stars": [1]}), tmp_path / "in.parquet")
    with pytest.raises(UserError, match="has no column 'label', only text, stars") as caught:
        run(prepare(tmp_path / "out", tokenizer, [tmp_path / "in.parquet"]))
    assert "--label-key" in caught.value.remedy
    parquet.write_table(pyarrow.table({"text": [b"caf\xe9"], "label": [1]}), tmp_path / "in.parquet")
    with pytest.raises(UserError, match=r"document 1: byte 0xe9 is not valid UTF-8 \[invalid_utf8\]"):
        run(prepare(tmp_path / "out", tokenizer, [tmp_path / "in.parquet"]))


@pytest.mark.parametrize(
    ("arguments", "where", "problem"),
    [
        (["--tokenizer", "T", "--append-eod"], "--label-key", "does not go with --append-eod"),
        (["--token-key", "ids"], "--token-key", "needs --vocab-size"),
        (["--tokenizer", "T", "--vocab-size", "9"], "--vocab-size", "belongs to --token-key"),
        (["--token-key", "i", "--vocab-size", "9", "--tokenizer", "T"], "--token-key", "does not go with --tokenizer"),
        (["--token-key", "i", "--vocab-size", "9", "--second-text-key", "t"], "--second-text-key", "does not go with"),
        (["--token-key", "i", "--vocab-size", "9", "--eod-token", "t"], "--eod-token", "is a token of --tokenizer"),
        (["--token-key", "i", "--vocab-size", "3000000000"], "--vocab-size", "3000000000"),
        (["--tokenizer", "T", "--classes", "a,a"], "--classes", "occurs twice"),
        (["--tokenizer", "T", "--classes", "a,"], "--classes", "is empty"),
        (["--tokenizer", "T", "--classes-from", "nothing"], "--classes-from nothing", "no dataset with a manifest"),
        (["--tokenizer", "T", "--shard", "0/1"], "--label-key", "many processes cannot tell the classes"),
        (
            ["--tokenizer", "T", "--max-text-tokens", "0"],
            "megachiar preprocess --max-text-tokens",
            "0 is not at least 1",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, tokenizer, monkeypatch, arguments, where, problem):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", examples(3))
    given = [str(tokenizer) if argument == "T" else argument for argument in arguments]
    with pytest.raises(UserError, match=problem) as caught:
        command.main(["--input", "in.jsonl", "--label-key", "label", "--output-prefix", "out", *given])
    assert caught.value.where == where and caught.value.remedy
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_classes_without_labels_and_text_files_with_labels_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("text")
    unlabelled = prepare(tmp_path / "out", tokenizer, [tmp_path / "a.txt"], label_key=None, classes=("a",))
    error = refused(lambda: run(unlabelled))
    assert error is not None and error.where == "--classes"
    error = refused(lambda: run(prepare(tmp_path / "out", tokenizer, [tmp_path / "a.txt"])))
    assert error is not None and "has no keys, but --label-key names one" in error.problem


def test_a_tokenizer_without_a_token_between_two_texts_is_refused(tmp_path, tokenizer):
    bare = json.loads(tokenizer.read_bytes())
    bare["added_tokens"] = []
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    path = write(tmp_path / "in.jsonl", [{"one": "a", "two": "b", "label": 1}])
    with pytest.raises(UserError, match="no end-of-document token, but --second-text-key asks for one"):
        run(prepare(tmp_path / "out", tmp_path / "bare.json", [path], text_key="one", second_text_key="two"))


# --- stopped, repeated, shared ----------------------------------------------------------------------------------------


def dies_at(settings: PreprocessSettings, call: int) -> bool:
    """Run in a copy of this process, which is gone at its ``call``-th sync or rename; return whether it came so far."""
    child = os.fork()
    if child == 0:  # no test of the copy may go on
        count = 0

        def counted(function):
            def at_once(*arguments):
                nonlocal count
                count += 1
                if count == call:
                    os._exit(9)
                return function(*arguments)

            return at_once

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
        try:
            run(settings)
            os._exit(0)
        finally:
            os._exit(3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize(
    ("shuffle_seed", "every"), [(7, 7), *(pytest.param(seed, 1, marks=pytest.mark.slow) for seed in (None, 7))]
)
def test_a_run_that_dies_anywhere_is_gone_on_with(tmp_path, tokenizer, corpus, monkeypatch, shuffle_seed, every):
    """The bytes are those of an undisturbed run. The classes are known at the end alone, and their order is another."""
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    monkeypatch.setattr(journal, "LARGEST_SHARE", float("inf"))
    monkeypatch.setattr(chunk_groups, "GROUP_BYTES", 0)
    changes = {"split": Split.parse("train=2,valid=1"), "shuffle_seed": shuffle_seed}
    (tmp_path / "whole").mkdir()
    run(prepare(tmp_path / "whole" / "out", tokenizer, corpus, **changes))
    whole = files_of(tmp_path / "whole")
    deaths = 0
    for call in range(1, 200, every):
        folder = tmp_path / f"at_{call}"
        folder.mkdir()
        settings = prepare(folder / "out", tokenizer, corpus, **changes)
        if not dies_at(settings, call):
            break
        deaths += 1
        dies_at(settings, call // 2 + 1)
        run(settings)
        assert files_of(folder) == whole, call
    assert 20 < deaths * every < 190


def test_labels_altered_in_an_unfinished_run_are_noticed(tmp_path, tokenizer, corpus, monkeypatch):
    monkeypatch.setattr(journal, "SECONDS_BETWEEN_CHECKPOINTS", 0)
    monkeypatch.setattr(journal, "LARGEST_SHARE", float("inf"))
    monkeypatch.setattr(chunk_groups, "GROUP_BYTES", 0)
    settings = prepare(tmp_path / "out", tokenizer, corpus)
    call = next(n for n in range(5, 100) if dies_at(settings, n) and (tmp_path / "out.labels.tmp").stat().st_size > 40)
    assert call
    content = bytearray((tmp_path / "out.labels.tmp").read_bytes())
    content[0] ^= 1
    (tmp_path / "out.labels.tmp").write_bytes(content)
    error = refused(lambda: run(settings))
    assert error is not None and "was altered since" in error.problem and "--restart" in error.remedy
    (tmp_path / "out.labels.tmp").write_bytes(content[:4])
    error = refused(lambda: run(settings))
    assert error is not None and "has 4 bytes, but the journal" in error.problem
    run(dataclasses.replace(settings, restart=True))
    assert content_of(tmp_path / "out") == expected(corpus)


def test_the_same_call_does_nothing_and_another_one_is_refused(tmp_path, tokenizer, corpus):
    settings = prepare(tmp_path / "out", tokenizer, corpus)
    run(settings)
    before = files_of(tmp_path)
    assert run(settings).existed and files_of(tmp_path) == before
    others = (
        {"classes": NAMES},
        {"max_text_tokens": 3},
        {"read": ReadOptions()},
        {"read": dataclasses.replace(settings.read, label_key="text")},
    )
    for change in others:
        error = refused(lambda change=change: run(dataclasses.replace(settings, **change)))
        assert error is not None and "it was made with" in error.problem
    labels_path(tmp_path / "out").unlink()
    error = refused(lambda: run(settings))
    assert error is not None and "out.labels.npy" in error.problem
    run(dataclasses.replace(settings, overwrite=True))
    assert files_of(tmp_path) == before


def test_a_dataset_without_labels_takes_the_place_of_a_labelled_one(tmp_path, tokenizer, corpus):
    settings = prepare(tmp_path / "out", tokenizer, corpus)
    run(settings)
    run(dataclasses.replace(settings, read=ReadOptions(), overwrite=True))
    assert not labels_path(tmp_path / "out").exists() and read_manifest(tmp_path / "out").labels is None


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_shards_and_merged_datasets_are_what_one_process_makes(tmp_path, tokenizer, corpus, shuffle_seed):
    changes = {"classes": tuple(sorted(NAMES)), "shuffle_seed": shuffle_seed, "split": Split.parse("train=2,valid=1")}
    for folder in ("whole", "shared", "merged"):
        (tmp_path / folder).mkdir()
    run(prepare(tmp_path / "whole" / "out", tokenizer, corpus, **changes))
    shared = prepare(tmp_path / "shared" / "out", tokenizer, corpus, **changes)
    for number in range(3):
        make_shard(shared, number, 3, io.StringIO())
    merge_shards(shared, 3)
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "whole")

    for number, part in enumerate((corpus[:2], corpus[2:])):
        run(prepare(tmp_path / "merged" / f"part_{number}", tokenizer, part, classes=tuple(sorted(NAMES))))
    inputs, output = [tmp_path / "merged" / f"part_{n}" for n in range(2)], tmp_path / "merged" / "out"
    merge_datasets(inputs, output, shuffle_seed=shuffle_seed)
    run(prepare(tmp_path / "one", tokenizer, corpus, classes=tuple(sorted(NAMES)), shuffle_seed=shuffle_seed))
    assert content_of(output) == content_of(tmp_path / "one")
    manifest = read_manifest(output)
    check_manifest(output, manifest, verify=True)
    assert find_merged(inputs, output, shuffle_seed) == manifest
    assert not [path.name for path in output.parent.iterdir() if path.name.endswith(".tmp")]


def test_datasets_of_other_classes_are_not_merged(tmp_path, tokenizer, corpus):
    run(prepare(tmp_path / "a", tokenizer, corpus[:2]))
    run(prepare(tmp_path / "b", tokenizer, corpus[2:], classes=NAMES))
    run(prepare(tmp_path / "c", tokenizer, corpus[2:], label_key=None))
    for other, problem in (("b", "has the classes zebra, apple"), ("c", "has no labels, but")):
        error = refused(lambda other=other: merge_datasets([tmp_path / "a", tmp_path / other], tmp_path / "out"))
        assert error is not None and problem in error.problem and "--classes-from" in error.remedy
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_a_merge_reads_no_damaged_labels(tmp_path, tokenizer, corpus):
    for name, part in (("a", corpus[:2]), ("b", corpus[2:])):
        run(prepare(tmp_path / name, tokenizer, part, classes=NAMES))
    content = bytearray(labels_path(tmp_path / "b").read_bytes())
    content[-4] ^= 1
    labels_path(tmp_path / "b").write_bytes(content)
    error = refused(lambda: merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "out"))
    assert error is not None and error.where == str(labels_path(tmp_path / "b"))


def test_the_tool_takes_the_classes_of_another_dataset(tmp_path, tokenizer, corpus):
    train = ["--input", *corpus, "--label-key", "label", "--tokenizer", tokenizer]
    done = run_tool(
        "preprocess_data", *train, "--output-prefix", tmp_path / "train", "--classes", "mango, zebra,Äpfel,apple"
    )
    assert done.returncode == 0, done.stderr
    few = write(tmp_path / "few.jsonl", [{"text": "a", "label": "apple"}, {"text": "b", "label": "mango"}])
    done = run_tool(
        *("preprocess_data", "--input", few, "--label-key", "label", "--tokenizer", tokenizer),
        *("--output-prefix", tmp_path / "test", "--classes-from", tmp_path / "train"),
    )
    assert done.returncode == 0, done.stderr
    assert "4 classes: mango 1, zebra 0, Äpfel 0, apple 1" in done.stderr
    assert np.load(tmp_path / "test.labels.npy").tolist() == [3, 0]
    done = run_tool("preprocess_data", "--input", few, "--output-prefix", tmp_path / "x")
    assert done.returncode == 2 and "--tokenizer is missing" in done.stderr
