"""A tracker in a thread of its own, so that it never ends or slows a run.

    training   |- step 10 -|- step 20 -|- step 30 -|      puts a point into the queue, and goes on
    thread     |-- import, open ------|- log -|- log -|- network is gone ... -| say it once, try again later

Packages take seconds to import and networks take as long as they like: all of it happens here.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable

from megachiar.training.trackers.points import Point
from megachiar.training.trackers.tracker import Tracker

MOST_WAITING = 10_000
"""Points that wait for a slow tracker; later ones are lost."""
CLOSING_S = 120.0
"""Seconds that the end of a run waits for a tracker to send what is left."""
FIRST_WAIT_S, LONGEST_WAIT_S = 30.0, 1800.0
"""Seconds until a tracker that failed is tried again; each failure doubles them."""


class TrackerThread:
    """Hands points to a tracker.

    What goes wrong is a line of the log, once, and the tracker is opened again later. Points in between are lost to it,
    and their number is said when it works again.

    Args:
        name: of the tracker, for people.
        open_tracker: imports and opens it; is called with the step that the run goes on from.
        step: that step.
        warn: prints a line of the log.
    """

    def __init__(self, name: str, open_tracker: Callable[[int], Tracker], step: int, warn: Callable[[str], None]):
        self._name, self._open, self._warn = name, open_tracker, warn
        self._step = step
        self._tracker: Tracker | None = None
        self._lost, self._has_failed = 0, False
        self._wait_s, self._next_try = FIRST_WAIT_S, 0.0
        self._queue: queue.Queue[Point | int | None] = queue.Queue(MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"megachiar-{name}", daemon=True)
        self._thread.start()

    def log(self, point: Point) -> None:
        """Add a point, without waiting."""
        try:
            self._queue.put_nowait(point)
        except queue.Full:
            self._lost += 1

    def rewind(self, step: int) -> None:
        """Let the tracker forget the points of steps after ``step``."""
        self._put(step)

    def close(self, timeout: float | None = None) -> None:
        """End the thread, and wait for it for so many seconds at most; ``CLOSING_S`` where none are given."""
        wait = CLOSING_S if timeout is None else timeout
        self._put(None)
        self._thread.join(wait)
        if self._thread.is_alive():
            self._warn(f"{self._name} does not end within {wait:g} s: the run leaves it alone")

    def _put(self, item: int | None) -> None:
        """Put in what must not be lost, in place of the oldest points if need be."""
        while True:
            try:
                self._queue.put_nowait(item)
                return
            except queue.Full:
                try:
                    self._queue.get_nowait()
                    self._lost += 1
                except queue.Empty:
                    pass

    def _work(self) -> None:
        self._try_to_open()
        while (item := self._queue.get()) is not None:
            if isinstance(item, int):
                self._step = item
                self._do(functools.partial(_rewind, step=item))
            else:
                if not self._do(functools.partial(_log, point=item)):
                    self._lost += 1
                self._step = item.step
        self._do(_close)
        if self._lost and not self._has_failed:
            self._warn(f"{self._name} was too slow: points that it lacks: {self._lost}")

    def _do(self, action: Callable[[Tracker], None]) -> bool:
        """Let the tracker act; return whether it did."""
        if self._tracker is None and time.monotonic() >= self._next_try:
            self._try_to_open()
        if self._tracker is None:
            return False
        try:
            action(self._tracker)
        except Exception as error:
            self._fail(error)
            return False
        if self._has_failed:
            self._has_failed, self._wait_s = False, FIRST_WAIT_S
            self._warn(f"{self._name} is written again; points that it lacks: {self._lost}")
            self._lost = 0
        return True

    def _try_to_open(self) -> None:
        try:
            self._tracker = self._open(self._step)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._has_failed:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            self._warn(f"{self._name} cannot be written: {reason}. The run goes on without it, and tries again later")
        tracker, self._tracker = self._tracker, None
        self._has_failed = True
        self._next_try = time.monotonic() + self._wait_s
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        if tracker is not None:
            try:
                tracker.close()
            except Exception:  # it has failed already
                return


def _log(tracker: Tracker, point: Point) -> None:
    tracker.log(point)


def _rewind(tracker: Tracker, step: int) -> None:
    tracker.rewind(step)


def _close(tracker: Tracker) -> None:
    tracker.close()
