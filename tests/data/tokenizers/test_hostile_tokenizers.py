"""Whatever happens to a tokenizer's files, they are loaded and can be used, or are refused in one message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile import EXAMPLES, IN_PLACE, for_each_damage, fresh_folder, put_in_place, refused
from text_helpers import DOCUMENTS, train

from megachiar.data.tokenizers.tokenizer import load_tokenizer

pytestmark = pytest.mark.timeout(60)
FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """File of a tokenizer -> all files of that tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizers")
    model = {"tokenizer.model": train(folder, "sentencepiece").read_bytes()}
    whole = {"tokenizer.json": train(folder, "huggingface").read_bytes()}
    described = json.loads(whole["tokenizer.json"])["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["merges"]]
    gpt2 = {
        "vocab.json": json.dumps(described["vocab"]).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
    }
    return {"tokenizer.model": model, "tokenizer.json": whole, "vocab.json": gpt2, "merges.txt": gpt2}


def use(path: Path) -> None:
    """Load a tokenizer, and encode and decode with it; its ids must be inside its vocabulary."""
    tokenizer = load_tokenizer(path)
    for ids in tokenizer.encode_batch(DOCUMENTS):
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        tokenizer.decode(ids)
    assert all(0 <= index < tokenizer.vocab_size for index in tokenizer.known_ids())


def path_of(folder: Path, name: str) -> Path:
    return folder if name in ("vocab.json", "merges.txt") else folder / name


@EXAMPLES
@pytest.mark.parametrize("name", FILES)
def test_damage_is_refused_or_leaves_a_tokenizer(files, tmp_path, name, examples):
    use(path_of(fresh_folder(tmp_path / "a", files[name]), name))

    def check(damaged: bytes) -> None:
        folder = fresh_folder(tmp_path / "a", {**files[name], name: damaged})
        refused(lambda: use(path_of(folder, name)))

    for_each_damage(files[name][name], check, examples)


@pytest.mark.parametrize("what", IN_PLACE)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_is_refused(files, tmp_path, name, what):
    folder = fresh_folder(tmp_path / "a", files[name])
    put_in_place(folder / name, what)
    error = refused(lambda: use(path_of(folder, name)))
    # A file of merges without a line is one: then each byte is a token.
    assert error is not None or (name, what) == ("merges.txt", "nothing in it")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("other", FILES)
def test_a_file_of_another_kind_is_refused(files, tmp_path, name, other):
    if name != other:
        folder = fresh_folder(tmp_path / "a", {**files[name], name: files[other][other]})
        assert refused(lambda: use(path_of(folder, name))) is not None


def test_a_piece_that_is_no_utf8_is_refused(files, tmp_path):
    content = files["tokenizer.model"]["tokenizer.model"]
    place = content.index("▁the".encode()) + 3
    folder = fresh_folder(tmp_path / "a", {"tokenizer.model": content[:place] + b"\xff" + content[place + 1 :]})
    error = refused(lambda: use(folder / "tokenizer.model"))
    assert error is not None and "is not a SentencePiece model" in error.problem
