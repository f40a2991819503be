"""Find the text that each token stands for.

A tokenizer decodes a list of ids, and one id alone may decode otherwise than in its place: SentencePiece drops a
leading space, and a byte of a character is no text. A token is therefore decoded behind the tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megachiar.data.tokenizers.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What decoders put where bytes are no character, or not yet."""
LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, and so the most tokens that share one."""


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
