"""Find the class of each token of a text: word, number, punctuation and so on."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from megachiar.data.tokenizers.token_reader import REPLACEMENT, TokenText

CLASSES = (
    "word",
    "word start",
    "word part",
    "number",
    "punctuation",
    "whitespace",
    "part of a character",
    "control",
)
"""The classes of tokens, of which each token has one. ``word`` is a whole word; ``word start`` and ``word part`` are
pieces of a word of several tokens. A run of letters without spaces is one word, in every script."""


def token_classes(texts: Sequence[TokenText]) -> list[str]:
    """Return the class of each token of a text, one of ``CLASSES``."""
    return [_class_of(texts, place) for place in range(len(texts))]


def _class_of(texts: Sequence[TokenText], place: int) -> str:
    text, control = texts[place]
    if control is not None:
        return "control"
    if not text or REPLACEMENT in text:
        return "part of a character"
    if text.isspace():
        return "whitespace"
    if not any(map(_is_of_word, text)):
        return "punctuation"
    if not any(letter.isalpha() for letter in text):
        return "number" if any(letter.isnumeric() for letter in text) else "word part"
    if _is_of_word(text[0]) and _is_of_word(_neighbour(texts, place, -1)[-1:]):
        return "word part"
    goes_on = _is_of_word(text[-1]) and _is_of_word(_neighbour(texts, place, 1)[:1])
    return "word start" if goes_on else "word"


def _neighbour(texts: Sequence[TokenText], place: int, step: int) -> str:
    """Return the text of the nearest token in the direction of ``step`` that has any; a control token is a border."""
    place += step
    while 0 <= place < len(texts) and texts[place].control is None:
        if texts[place].text:
            return texts[place].text
        place += step
    return ""


def _is_of_word(letter: str) -> bool:
    """Return whether ``letter``, or nothing, is a letter, a digit or a mark over one."""
    return letter.isalnum() or unicodedata.category(letter or " ").startswith("M")
