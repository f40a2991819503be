"""Curves of bounded size: a run of any length has at most a few thousand points, among them all peaks."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_POINTS = 4096
NEWEST = 64
"""Points at the end of a curve that are never left out: they tell how far records are apart."""


@dataclass
class Curve:
    """Points by rising step.

    Attributes:
        steps: of the points.
        values: as many, finite or nan.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def last(self) -> float | None:
        """The newest value; None without points."""
        return self.values[-1] if self.values else None

    def add(self, step: int, value: float) -> None:
        """Add the newest point; too many are thinned evenly over the steps, so that no part of a long run is lost."""
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) > MOST_POINTS:
            newest = len(self.steps) - NEWEST
            kept = thinned(self.steps[:newest], self.values, MOST_POINTS // 2)
            kept += range(newest, len(self.steps))
            self.steps = [self.steps[place] for place in kept]
            self.values = [self.values[place] for place in kept]

    def forget_from(self, step: int) -> None:
        """Leave out the points of ``step`` and of later ones, which are taken once more."""
        place = bisect.bisect_left(self.steps, step)
        del self.steps[place:]
        del self.values[place:]


def thinned(steps: Sequence[int], values: Sequence[float], most: int) -> list[int]:
    """Return the places of at most ``most + 2`` points, in order: first, last, and the extremes of each part.

    Parts have as many steps each, and not as many points: of points that were thinned before, the older ones are
    further apart, and they would become fewer each time.

    Args:
        steps: of the points, rising.
        values: of the points; later ones than the last step are left alone.
        most: of the places.
    """
    if len(steps) <= most:
        return list(range(len(steps)))
    parts = max(1, most // 2)
    first, end = steps[0], steps[-1] + 1
    kept, start = {0, len(steps) - 1}, 0
    for part in range(1, parts + 1):
        stop = bisect.bisect_left(steps, first + part * (end - first) / parts, lo=start)
        known = [place for place in range(start, stop) if values[place] == values[place]]
        if known:
            kept |= {min(known, key=values.__getitem__), max(known, key=values.__getitem__)}
        start = stop
    return sorted(kept)
