"""Curves of bounded size: a run of any length has at most a few thousand points, among them all peaks."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_POINTS = 4096


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
        """Add the newest point; of too many points those that are neither least nor greatest of four are left out."""
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) > MOST_POINTS:
            kept = thinned(self.values, MOST_POINTS // 2)
            self.steps = [self.steps[place] for place in kept]
            self.values = [self.values[place] for place in kept]

    def forget_from(self, step: int) -> None:
        """Leave out the points of ``step`` and of later ones, which are taken once more."""
        place = bisect.bisect_left(self.steps, step)
        del self.steps[place:]
        del self.values[place:]


def thinned(values: Sequence[float], most: int) -> list[int]:
    """Return the places of at most ``most + 2`` values, in order: first, last, and the extremes of each part."""
    if len(values) <= most:
        return list(range(len(values)))
    parts = max(1, most // 2)
    kept = {0, len(values) - 1}
    for part in range(parts):
        places = range(part * len(values) // parts, (part + 1) * len(values) // parts)
        known = [place for place in places if values[place] == values[place]]
        if known:
            kept |= {min(known, key=values.__getitem__), max(known, key=values.__getitem__)}
    return sorted(kept)
