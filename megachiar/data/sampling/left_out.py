"""Skip the places of an order of samples that a run never reads, since it has rolled back from the steps that did."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


class LeftOut:
    """Map the positions of a run to places in an order, some of which the run leaves out.

        place      0 1 2 3 4 5 6 7 8 9       left out: 3 to 5
        position   0 1 2 . . . 3 4 5 6

    Args:
        ranges: first place and end of each range that is left out, ascending and apart.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]]):
        lengths = np.array([end - first for first, end in ranges], dtype=np.int64)
        before = np.concatenate([[0], np.cumsum(lengths)])
        self._starts = np.array([first for first, _ in ranges], dtype=np.int64) - before[:-1]  # positions
        self._before = before
        self._ranges = tuple(ranges)

    def places(self, positions: IntArray) -> IntArray:
        """Return the place of each position, int64 (n,)."""
        return positions + self._before[np.searchsorted(self._starts, positions, side="right")]

    def place(self, position: int) -> int:
        """Return the place of ``position``."""
        return int(self.places(np.array([position]))[0])

    def places_from(self, first: int) -> IntArray:
        """Return every place from ``first`` on that is left out, int64 (n,), ascending."""
        return numbers_in([(max(begin, first), end) for begin, end in self._ranges if end > first])


def numbers_in(ranges: Sequence[tuple[int, int]]) -> IntArray:
    """Return every number in ranges that are given by their first number and end, int64 (n,)."""
    return np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(first, end) for first, end in ranges)])


def as_ranges(numbers: IntArray) -> tuple[tuple[int, int], ...]:
    """Return numbers, int64 (n,), as ranges that are ascending and apart: the first number and the end of each."""
    if not numbers.size:
        return ()
    numbers = np.unique(numbers)
    gaps = np.flatnonzero(np.diff(numbers) > 1)
    firsts, ends = numbers[np.append(0, gaps + 1)], numbers[np.append(gaps, -1)] + 1
    return tuple(zip(firsts.tolist(), ends.tolist(), strict=True))
