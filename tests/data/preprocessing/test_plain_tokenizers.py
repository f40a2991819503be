"""Tokenizers of bytes and of words: what they encode, and what the command refuses."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_helpers import DOCUMENTS, numbered_documents, write_jsonl

from megachiar.cli import tokenizer as command
from megachiar.data.inputs.find_inputs import find_sources
from megachiar.data.preprocessing.tokenizer_training import TrainingSettings, train_tokenizer
from megachiar.data.tokenizers.fast import choose_engine
from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.errors import UserError

pytestmark = pytest.mark.every_python


@pytest.fixture(scope="module")
def byte_file(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("bytes") / "bytes.json"
    train_tokenizer(TrainingSettings([], output, None, "bytes"), io.StringIO())
    return output


def words(folder: Path, texts: list[str], vocab_size: int | None = None) -> Path:
    output = folder / "words.json"
    sources = find_sources([write_jsonl(folder / "in.jsonl", texts)])
    train_tokenizer(TrainingSettings(sources, output, vocab_size, "words"), io.StringIO())
    return output


def test_the_id_of_a_byte_is_its_value(byte_file):
    tokenizer = load_tokenizer(byte_file)
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.unknown_id) == (257, 256, None)
    for text in [*DOCUMENTS, "".join(map(chr, range(256))), "<|endoftext|>"]:
        assert list(tokenizer.encode(text)) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_text_becomes_its_bytes_with_every_engine(byte_file, text):
    reference = load_tokenizer(byte_file)
    assert list(reference.encode(text)) == list(text.encode())
    assert list(choose_engine("auto", reference, []).tokenizer.encode(text)) == list(text.encode())


def test_words_are_counted_and_numbered_by_frequency(tmp_path):
    texts = ["[MAX 3 [MIN 2 1 ] 4 ]", "[SM 9 9 9 ]", "  3\t3\n[SM 1 ]  "]
    counts = Counter(" ".join(texts).split())
    expected = ["<unk>", "<|endoftext|>", *sorted(counts, key=lambda word: (-counts[word], word))]
    tokenizer = load_tokenizer(words(tmp_path, texts))
    assert (tokenizer.vocab_size, tokenizer.unknown_id, tokenizer.eod_id) == (len(expected), 0, 1)
    for text in texts:
        assert list(tokenizer.encode(text)) == [expected.index(word) for word in text.split()]
        assert tokenizer.decode(tokenizer.encode(text)) == " ".join(text.split())
    assert list(tokenizer.encode("[MAX 77 ]")) == [expected.index("[MAX"), 0, expected.index("]")]


def test_a_small_vocabulary_keeps_the_most_frequent_words(tmp_path):
    tokenizer = load_tokenizer(words(tmp_path, ["a a a b b c", "d b"], vocab_size=4))
    assert tokenizer.vocab_size == 4 and list(tokenizer.encode("a b c d")) == [2, 3, 0, 0]


def test_no_word_is_a_control_token(tmp_path):
    tokenizer = load_tokenizer(words(tmp_path, ["one <|endoftext|> two <unk> three"]))
    assert tokenizer.vocab_size == 5
    assert tokenizer.eod_id not in list(tokenizer.encode("one <|endoftext|> two <unk>"))


def test_a_tokenizer_of_words_is_encoded_by_its_library(tmp_path):
    choice = choose_engine("auto", load_tokenizer(words(tmp_path, numbered_documents(3))), ["Document 1:"])
    assert choice.kind == "reference" and "\n" not in choice.reason


def test_the_same_command_does_nothing(byte_file, tmp_path):
    again = train_tokenizer(TrainingSettings([], byte_file, None, "bytes"), io.StringIO())
    assert again.existed and again.tokenizer.vocab_size == 257
    first = words(tmp_path, ["a b"]).read_bytes()
    sources = find_sources([tmp_path / "in.jsonl"])
    report = train_tokenizer(TrainingSettings(sources, tmp_path / "words.json", None, "words"), io.StringIO())
    assert report.existed and (tmp_path / "words.json").read_bytes() == first


@pytest.mark.parametrize(
    ("changes", "where", "problem"),
    [
        ({"kind": "bytes", "vocab_size": 300}, "--vocab-size", "has 257 tokens"),
        ({"kind": "bytes", "with_input": True}, "--input", "is not read"),
        ({"kind": "words", "with_input": True, "vocab_size": 2}, "--vocab-size", "no room for words"),
        ({"kind": "huggingface", "with_input": True}, "--vocab-size", "is missing"),
        ({"kind": "words", "with_input": True, "algorithm": "unigram"}, "--algorithm", "words"),
    ],
)
def test_what_a_kind_cannot_have_is_refused(tmp_path, changes, where, problem):
    source = write_jsonl(tmp_path / "in.jsonl", ["a"])
    sources = find_sources([source]) if changes.pop("with_input", False) else []
    values = {"sources": sources, "output": tmp_path / "t.json", "vocab_size": None, **changes}
    with pytest.raises(UserError, match=problem) as refused:
        train_tokenizer(TrainingSettings(**values), io.StringIO())
    assert refused.value.where == where and not (tmp_path / "t.json").exists()


def test_the_command_makes_both(tmp_path, capsys):
    command.main(["--kind", "bytes", "--output", str(tmp_path / "b.json")])
    assert capsys.readouterr().err.endswith("257 tokens, end of document 256\n")
    write_jsonl(tmp_path / "in.jsonl", ["x y z"])
    command.main(["--kind", "words", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "w.json")])
    assert json.loads((tmp_path / "w.json").read_text())["model"]["type"] == "WordLevel"
    with pytest.raises(UserError, match="--input and --vocab-size are missing"):
        command.main(["--output", str(tmp_path / "c.json")])
    with pytest.raises(UserError, match="--input is missing"):
        command.main(["--kind", "words", "--output", str(tmp_path / "c.json")])
