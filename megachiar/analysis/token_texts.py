"""Find the text that each token stands for, and its class: word, number, punctuation and so on.

A tokenizer decodes a list of ids, and one id alone may decode otherwise than in its place: SentencePiece drops a
leading space, and a byte of a character is no text. A token is therefore decoded behind the tokens before it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from megachiar.data.tokenizers.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What decoders put where bytes are no character, or not yet."""
LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, and so the most tokens that share one."""
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


class TokenText(NamedTuple):
    """What a token stands for.

    Attributes:
        text: its part of the text; empty for control tokens, and where a later token completes its character.
        control: the name of a control token; None for text.
    """

    text: str
    control: str | None


class TokenReader:
    """Decode tokens one after another, so that their texts joined are the text of all of them."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._unread: list[int] = []

    def read(self, token: int) -> TokenText:
        """Return what the next token stands for."""
        if token in self._tokenizer.controls:
            self._before, self._unread = [token], []
            return TokenText("", self._tokenizer.controls[token])
        self._unread.append(token)
        before = self._tokenizer.decode(self._before)
        now = self._tokenizer.decode([*self._before, *self._unread])
        if now.endswith(REPLACEMENT) and len(self._unread) < LONGEST_CHARACTER:
            return TokenText("", None)  # the character may be completed by the next token
        text = now[len(before) :] if now.startswith(before) else self._tokenizer.decode(self._unread)
        self._before, self._unread = self._unread, []
        return TokenText(text, None)

    def rest(self) -> str:
        """Return the text of tokens at the end that complete no character."""
        if not self._unread:
            return ""
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *self._unread])[len(before) :]


def token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[TokenText]:
    """Return what each of ``tokens`` stands for."""
    reader = TokenReader(tokenizer)
    texts = [reader.read(token) for token in tokens]
    if rest := reader.rest():
        texts[-1] = TokenText(rest, None)
    return texts


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
