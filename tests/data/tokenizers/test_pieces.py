"""Texts in pieces: the reference's words and ids, whatever the characters around a cut."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import tokenizers
from text_helpers import DOCUMENTS, numbered_documents, train

from megachiar.data.tokenizers import pieces as piece_tokenizer
from megachiar.data.tokenizers.fast import HARD_TEXTS
from megachiar.data.tokenizers.pieces import CHECKED_EVERY, LONGEST_CACHED, PIECE, PieceTokenizer, with_piece_cache
from megachiar.data.tokenizers.tokenizer import load_tokenizer

pytestmark = pytest.mark.every_python

# Of each class that the expressions tell apart, and what the classes of other libraries disagree about.
CHARACTERS = (
    "a",
    "Z",
    "s",
    "7",
    "'",
    ".",
    "_",
    "~",
    " ",
    "\n",
    "\t",
    "\r",
    "\x1c",
    "\x85",
    "\u00a0",
    "\u3000",
    "é",
    "中",
)
CHARACTERS += ("\u0301", "\u200b", "²", "ª", "🙂", "\x00")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return load_tokenizer(train(tmp_path_factory.mktemp("tokenizer"), "huggingface"))


def texts() -> list[str]:
    """Every text of up to 3 of the characters, and many longer ones."""
    short = ["".join(text) for length in range(4) for text in itertools.product(CHARACTERS, repeat=length)]
    rng = random.Random(0)
    longer = ["".join(rng.choices(CHARACTERS, k=rng.randint(4, 14))) for _ in range(20_000)]
    more_spaces = ["".join(rng.choices(CHARACTERS[:12], k=rng.randint(4, 14))) for _ in range(20_000)]
    return [*short, *longer, *more_spaces, *HARD_TEXTS, *DOCUMENTS]


def test_the_words_of_the_pieces_are_those_of_the_text():
    """Compared before any merge, so that no vocabulary can hide a cut inside a word."""
    words = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def words_of(text: str) -> list[str]:
        return [word for word, _ in words.pre_tokenize_str(text)]

    cuts = 0
    for text in texts():
        pieces = PIECE.findall(text)
        cuts += len(pieces)
        assert "".join(pieces) == text, repr(text)
        assert [word for piece in pieces for word in words_of(piece)] == words_of(text), (text, pieces)
    assert cuts > 100_000
    assert PIECE.findall("it's (self.x1 = 3.5)\n    naïve, déjà vu") == [
        "it", "'s", " (self", ".x1", " =", " 3", ".5", ")", "\n    naïve,", " déjà", " vu",
    ]  # fmt: skip


def test_ids_are_those_of_the_whole_text_whatever_is_known(byte_level, monkeypatch):
    monkeypatch.setattr(piece_tokenizer, "MOST_CACHED", 300)
    apart, known = PieceTokenizer(byte_level), []
    batches = [[*HARD_TEXTS, *DOCUMENTS], *([text] for text in numbered_documents(300)), ["x" * 900, " ", ""], []]
    for batch in batches:
        for ids, text in zip(apart.encode_batch(batch), batch, strict=True):
            assert np.array_equal(ids, byte_level.encode(text)), text
        known.append(len(apart._cache))
        assert all(len(piece) <= LONGEST_CACHED for piece in apart._cache)
    assert max(known) > 200 and sorted(known) != known  # forgotten, and learnt again


def test_control_strings_in_text_stay_text(byte_level):
    end = byte_level.controls[byte_level.eod_id]
    ids = PieceTokenizer(byte_level).encode(f"a {end} b{end}")
    assert byte_level.eod_id not in ids and byte_level.decode(ids) == f"a {end} b{end}"


def test_a_wrong_cut_is_found_by_looking_now_and_then(byte_level, monkeypatch):
    apart = PieceTokenizer(byte_level)
    for _ in range(CHECKED_EVERY):
        apart.encode_batch(["the quick fox"])
    monkeypatch.setattr(piece_tokenizer, "PIECE", piece_tokenizer.re.compile("(?s)."))
    with pytest.raises(RuntimeError, match="a text in pieces has other ids than as a whole: 'the quick fox'"):
        apart.encode_batch(["the quick fox"])


@pytest.mark.parametrize("change", ["none", "normalizer", "prefix space", "other words", "added word", "sentencepiece"])
def test_only_texts_that_are_cut_like_gpt2s_are_taken_apart(tmp_path, change):
    path = train(tmp_path, "sentencepiece" if change == "sentencepiece" else "huggingface")
    if change not in ("none", "sentencepiece"):
        described = json.loads(path.read_text())
        if change == "normalizer":
            described["normalizer"] = {"type": "Lowercase"}
        elif change == "prefix space":
            described["pre_tokenizer"]["add_prefix_space"] = True
        elif change == "other words":
            described["pre_tokenizer"] = {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
                    {**described["pre_tokenizer"], "use_regex": False},
                ],
            }
        else:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
            described["added_tokens"].append({"id": 400, "content": "quick fox", **flags})
        path.write_text(json.dumps(described))
    reference = load_tokenizer(path)
    assert isinstance(with_piece_cache(reference), PieceTokenizer) == (change == "none")
    assert np.array_equal(with_piece_cache(reference).encode("the quick fox"), reference.encode("the quick fox"))
