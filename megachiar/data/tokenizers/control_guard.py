"""Keep control ids out of encoded text where a library lets them through."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from megachiar.errors import UserError


class ControlTokenError(UserError):
    """A tokenizer makes a control token of ordinary text, so that this text cannot be encoded."""


def any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Return an expression that matches each of ``strings``, the longer ones first; nothing where there are none."""
    longest_first = sorted(filter(None, strings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) if longest_first else r"(?!)")


class ControlGuard:
    """Keep control ids out of encoded text where a library lets them through.

    A unigram or word-level vocabulary holds its control tokens as ordinary entries, so that a literal ``</s>`` is
    looked up like a word. Such a text is cut inside each control string, and its parts are encoded apart.

    Args:
        path: the tokenizer's file or folder, for errors.
        controls: id -> string that must not occur in text.
        encode_plain: the library's own encoding of texts.
    """

    def __init__(self, path: Path, controls: dict[int, str], encode_plain: Callable[[list[str]], list[list[int]]]):
        self._path = path
        self._controls = controls
        self._encode_plain = encode_plain
        self._pattern = any_of(controls.values())

    def clean(self, text: str, ids: list[int]) -> list[int]:
        """Return ``ids`` of ``text`` if they hold no control id, else the ids of the text cut inside control strings.

        Raises:
            ControlTokenError: a control id is left even then, because the tokenizer makes it out of other characters.
        """
        if self._controls.keys().isdisjoint(ids):
            return ids
        cuts = [0, *(match.start() + 1 for match in self._pattern.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts) if start < end]
        apart = [index for part in self._encode_plain(parts) for index in part]
        left = sorted({self._controls[index] for index in self._controls.keys() & set(apart)})
        if left:
            raise ControlTokenError(
                self._path,
                f"encodes ordinary text as the control token {left[0]!r}",
                f"take {left[0]!r} out of the text, or use a tokenizer that has control tokens apart from its pieces",
            )
        return apart
