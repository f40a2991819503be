"""Pieces of a growing text: joined they are the text of its tokens, and they end at a stop string."""

from __future__ import annotations

import random

import pytest
from text_helpers import train

from megachiar.data.tokenizers.tokenizer import load_tokenizer
from megachiar.inference.text_stream import TextStream

TEXT = "Äpfel und 日本語 🙂🙂 the quick brown fox,\n  and   more — «quoted» text"


@pytest.fixture(scope="module", params=("sentencepiece", "huggingface"))
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(train(tmp_path_factory.mktemp(request.param), request.param, 400))


def pieces_of(stream: TextStream, tokens: list[int]) -> list[str]:
    pieces = []
    for token in tokens:
        pieces.append(stream.read(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


def test_pieces_joined_are_the_text(tokenizer):
    ids = [int(token) for token in tokenizer.encode(TEXT)]
    for start in (1, 3, len(ids) // 2, len(ids) - 1):
        stream = TextStream(tokenizer, ids[:start])
        pieces = pieces_of(stream, ids[start:])
        assert "\ufffd" not in "".join(pieces[:-1])
        whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:start])
        if "\ufffd" not in before:  # the prompt ends with a whole character
            assert before + "".join(pieces) == whole
        assert stream.shown == sum(map(len, pieces)) and len(stream.texts) == len(ids) - start


def test_a_text_ends_before_its_first_stop_string(tokenizer):
    ids = [int(token) for token in tokenizer.encode(TEXT)]
    stream = TextStream(tokenizer, ids[:1])
    rest = "".join(pieces_of(stream, ids[1:]))
    draw = random.Random(0)
    for _ in range(60):
        start = draw.randrange(len(rest) - 1)
        stops = [rest[start : start + draw.randint(1, 9)], "not there", rest[-3:] + "!"]
        stream = TextStream(tokenizer, ids[:1], stops)
        shown = "".join(pieces_of(stream, ids[1:]))
        assert shown == rest[: rest.index(stops[0])] and stream.stopped


def test_what_may_become_a_stop_string_is_held_back_and_comes_in_the_end(tokenizer):
    ids = [int(token) for token in tokenizer.encode("a b c the end")]
    whole = "".join(pieces_of(TextStream(tokenizer, ids[:1]), ids[1:]))
    stream = TextStream(tokenizer, ids[:1], ["ends here"])
    *pieces, last = pieces_of(stream, ids[1:])
    assert "".join(pieces) + last == whole and not stream.stopped
    assert not "".join(pieces).endswith("end") and last.endswith("end")
