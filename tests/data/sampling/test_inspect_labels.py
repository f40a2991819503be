"""``megachiar inspect`` of labelled datasets: classes, lengths, an example with its label, and what is too long."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hostile import refused

from megachiar.cli import inspect as command
from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing.plain_tokenizers import byte_tokenizer
from megachiar.data.preprocessing.preprocess import preprocess
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.sampling.inspection import find_tokenizer, longer_documents, show_document, summarise
from megachiar.data.storage.files import labels_path
from megachiar.errors import UserError

pytestmark = pytest.mark.every_python


@pytest.fixture
def prefix(tmp_path) -> Path:
    """A hundred examples of 1 to 100 bytes, of which every fourth is of class b."""
    (tmp_path / "bytes.json").write_bytes(byte_tokenizer())
    records = [{"text": "x" * (number + 1), "label": "ab"[number % 4 == 3]} for number in range(100)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    read = ReadOptions(label_key="label")
    settings = PreprocessSettings(
        find_sources([tmp_path / "in.jsonl"]),
        tmp_path / "bytes.json",
        tmp_path / "data",
        read=read,
        classes=("a", "b", "never"),
    )
    preprocess(settings, io.StringIO())
    return tmp_path / "data"


@pytest.fixture
def ids(tmp_path) -> Path:
    (tmp_path / "ids.jsonl").write_text('{"tokens": [5, 6], "label": 1}\n{"tokens": [0], "label": 0}\n')
    read = ReadOptions(label_key="label", token_key="tokens")
    settings = PreprocessSettings(
        find_sources([tmp_path / "ids.jsonl"]), None, tmp_path / "ids", read=read, vocab_size=9
    )
    preprocess(settings, io.StringIO())
    return tmp_path / "ids"


@pytest.mark.parametrize("verify", [False, True])
def test_classes_and_lengths_are_counted(prefix, verify):
    summary = summarise(prefix, verify=verify)
    assert summary["classes"] == {"a": 75, "b": 25, "never": 0}
    quantiles = {"5 %": 5, "25 %": 25, "50 %": 50, "75 %": 75, "95 %": 95, "99 %": 99}
    assert summary["document_quantiles"] == quantiles
    assert summary["files"][str(labels_path(prefix))] == labels_path(prefix).stat().st_size
    assert "labels" in summary["verified"] and ("checksums" in summary["verified"]) == verify
    json.dumps(summary)


def test_documents_longer_than_a_sequence_are_counted(prefix):
    longer = longer_documents(prefix, 90)
    assert longer["documents"] == 10 and longer["share_of_documents"] == 0.1
    assert longer["tokens_beyond"] == sum(range(1, 11))
    assert longer["share_of_tokens"] == pytest.approx(55 / 5050)
    assert longer_documents(prefix, 100)["documents"] == 0


def test_an_example_is_shown_with_its_label(prefix, ids):
    shown = show_document(prefix, 7, find_tokenizer(prefix, None))
    assert (shown["label"], shown["class_number"], shown["text"]) == ("b", 1, "x" * 8)
    shown = show_document(ids, 0, find_tokenizer(ids, None))
    assert (shown["label"], shown["ids"], shown["text"]) == ("1", [5, 6], None)


def test_the_command_prints_what_there_is(prefix, ids, capsys):
    command.main([str(prefix), "--verify", "--sequence-length", "90"])
    shown = capsys.readouterr().out
    for line in (
        "classes         0 a: 75 documents (75.0%)",
        "                2 never: 0 documents (0.0%)",
        "at most         5 % 5, 25 % 25, 50 % 50, 75 % 75, 95 % 95, 99 % 99 tokens",
        "longer          10 documents (10.0%) than 90 tokens, by 55 tokens (1.1%)",
    ):
        assert line in shown.splitlines()
    command.main([str(prefix), "--document", "3"])
    assert "label: b\nclass number: 1\n" in capsys.readouterr().out
    command.main([str(ids), "--json", "--sequence-length", "1"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["classes"] == {"0": 1, "1": 1} and printed["longer"]["documents"] == 1
    command.main([str(ids)])
    assert "tokenizer       none: ready-made ids below 9" in capsys.readouterr().out


def test_flipped_labels_and_missing_ones_end_in_one_message(prefix):
    content = bytearray(labels_path(prefix).read_bytes())
    content[-4] ^= 1
    labels_path(prefix).write_bytes(content)
    error = refused(lambda: command.main([str(prefix)]))
    assert error is not None and error.where == str(labels_path(prefix)) and "have checksum" in error.problem
    labels_path(prefix).unlink()
    for arguments in ([], ["--verify"], ["--document", "1"]):
        error = refused(lambda arguments=arguments: command.main([str(prefix), *arguments]))
        assert error is not None and error.where == str(labels_path(prefix))


def test_options_that_belong_to_others_are_refused(prefix, ids, tmp_path):
    with pytest.raises(UserError, match="belongs to --sample"):
        command.main([str(prefix), "--seed", "3"])
    with pytest.raises(UserError, match="--sequence-length: belongs to PREFIX"):
        command.main(["--config", "a.yaml", "--step", "1", "--sequence-length", "3"])
    with pytest.raises(UserError, match=r"no tokenizer made these ids, but .*bytes\.json is given"):
        (tmp_path / "bytes.json").write_bytes(byte_tokenizer())
        command.main([str(ids), "--document", "1", "--tokenizer", str(tmp_path / "bytes.json")])
