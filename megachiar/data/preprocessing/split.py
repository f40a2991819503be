"""Which part of a corpus (training, validation, test) each document belongs to."""

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
    """Parts of a corpus and which documents belong to each.

    A document goes where the hash of its text falls, so that it stays in its part however the corpus is ordered, cut
    into files or added to, and so that equal documents are never on both sides.

    Attributes:
        names: of the parts, in order.
        bounds: a document with hash h belongs to the first part with ``h < bound``; the last one is 2**64.
        text: names and weights as they were given.
    """

    names: tuple[str, ...]
    bounds: tuple[int, ...]
    text: str = ""

    @classmethod
    def parse(cls, text: str) -> Split:
        """Read ``"train=98,valid=1,test=1"``: names and their weights, whatever these sum to.

        Raises:
            UserError: not of that form, a name twice, or a weight that is not above 0.
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
        """Index of the part that the document with this text belongs to."""
        digest = hashlib.blake2b(utf8, digest_size=HASH_BITS // 8).digest()
        return bisect.bisect_right(self.bounds, int.from_bytes(digest, "little"))


def _bad_split(text: str, problem: str) -> UserError:
    return UserError(f"--split {text}", problem, "write it like train=98,valid=1,test=1")
