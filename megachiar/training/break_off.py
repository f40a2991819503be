"""Break off a long piece of work on all ranks at the same place, when any of them is asked to stop.

Every rank must take part in every batch of an evaluation. So the ranks agree between two batches, by a sum over all of
them. They do so about every second, whatever a batch takes: each sum also tells how long a batch took on average, so
that all ranks count on to the same next batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

ASK_EVERY_S = 1.0
_GROWTH = 4  # a few quick batches at the beginning do not stand for all


class EvaluationBrokenOff(Exception):
    """An evaluation was broken off, on all ranks before the same batch, since a rank was asked to stop."""


class BreakOff:
    """Asks the ranks now and then whether to go on.

    Args:
        stop: whether this rank is asked to stop.
        reduce_sum: returns the sum of each value over all ranks.
    """

    def __init__(self, stop: Callable[[], bool], reduce_sum: Callable[[list[float]], list[float]]):
        self._stop = stop
        self._reduce_sum = reduce_sum
        self._batches = self._left = 1
        self._asked: float | None = None

    def asked(self) -> bool:
        """Return whether any rank is asked to stop; every rank calls this method before each batch."""
        self._left -= 1
        if self._left:
            return False
        first = self._asked is None
        taken = 0.0 if self._asked is None else (time.monotonic() - self._asked) / self._batches
        stops, seconds, ranks = self._reduce_sum([float(self._stop()), taken, 1.0])
        fitting = int(ASK_EVERY_S / max(1e-6, seconds / ranks))
        self._batches = self._left = 1 if first else max(1, min(fitting, _GROWTH * self._batches))
        self._asked = time.monotonic()
        return stops > 0
