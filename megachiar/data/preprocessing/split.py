"""Assign each document of a corpus to a part: training, validation or test."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import re
from dataclasses import dataclass
from fractions import Fraction

from megachiar.errors import UserError

HASH_BITS = 64


@dataclass(frozen=True)
class Split:
    """Assign documents to the parts of a corpus.

    The hash of a document's text decides its part. So a document stays in its part however the corpus is ordered, cut
    into files or extended. Equal documents are never in two parts.

    Attributes:
        names: the names of the parts, in order.
        bounds: a document with hash h belongs to the first part with ``h < bound``; the last bound is 2**64.
        text: names and weights as they were given.
    """

    names: tuple[str, ...]
    bounds: tuple[int, ...]
    text: str = ""

    @classmethod
    def parse(cls, text: str) -> Split:
        """Parse ``"train=98,valid=1,test=1"``: names and their weights, with any sum.

        Raises:
            UserError: the text is not of that form, has a name twice, or has a weight that is not above 0.
        """
        parts = [part.partition("=") for part in text.split(",")]
        names = tuple(name.strip() for name, _, _ in parts)
        try:
            weights = [Fraction(weight.strip()) for _, _, weight in parts]
        except (ValueError, ZeroDivisionError) as error:
            raise _bad_split(text, "a weight is not a number") from error
        if not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) for name in names):
            raise _bad_split(text, "a name may hold letters, digits, - and _")
        if len(set(names)) != len(names):
            raise _bad_split(text, "a name occurs twice")
        if min(weights) <= 0:
            raise _bad_split(text, "weights must be above 0")
        ends = itertools.accumulate(weights)
        return cls(names, tuple(int(end / sum(weights) * 2**HASH_BITS) for end in ends), text)

    def part_of(self, utf8: bytes) -> int:
        """Return the index of the part that the document with this text belongs to."""
        digest = hashlib.blake2b(utf8, digest_size=HASH_BITS // 8).digest()
        return bisect.bisect_right(self.bounds, int.from_bytes(digest, "little"))


def _bad_split(text: str, problem: str) -> UserError:
    """Return the error for a split that cannot be parsed."""
    return UserError(f"--split {text}", problem, "write it like train=98,valid=1,test=1")
