"""What a rank is doing: a progress counter that its main thread moves on, and that its watch sends with each heartbeat.

The main thread says what it begins, in words that people know. It costs a few attribute writes a micro-batch, and
needs no lock: the watch may read a value that is a moment old.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from enum import IntEnum


class Stage(IntEnum):
    """What the main thread of a rank goes through, in this order, in every step; the test comes after the last step."""

    START = 0
    TRAIN = 1
    LOG = 2
    EVALUATE = 3
    SAVE = 4
    TEST = 5
    END = 6


class Activity:
    """What the main thread of this rank does, and how far it is.

    Attributes:
        doing: what it does, to be read after "rank 3": "reads sample 8123".
        step: the step that it works on; 0 before the first.
        stage: of that step.
        item: of that stage: the number of a micro-batch or of a window.
        count: grows with everything that begins. It stands still in a main thread that makes no progress.
        steps: steps that this process has trained.
        step_seconds: seconds that they took.
        waited_seconds: seconds of them that this rank spent in calls that wait for other ranks.
        communicating: makes a context around each such call, for a clock that splits the time of steps.
    """

    def __init__(self) -> None:
        self.doing = "starts"
        self.step = 0
        self.stage = Stage.START
        self.item = 0
        self.count = 0
        self.steps = 0
        self.step_seconds = 0.0
        self.waited_seconds = 0.0
        self.communicating: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self._waited = 0.0
        self._waited_before_step = 0.0

    @property
    def place(self) -> tuple[int, int, int]:
        """How far this rank is; of two ranks the one with the smaller place is behind."""
        return self.step, int(self.stage), self.item

    def begin(self, doing: str, stage: Stage, step: int, item: int = 0) -> None:
        """Say what this rank does from now on."""
        self.doing, self.step, self.stage, self.item = doing, step, stage, item
        self.count += 1

    def begin_step(self) -> None:
        """Begin to measure how long this rank waits for others in a step."""
        self._waited_before_step = self._waited

    def end_step(self, seconds: float) -> None:
        """Record a step of so many seconds."""
        self.steps += 1
        self.step_seconds += seconds
        self.waited_seconds += min(seconds, self._waited - self._waited_before_step)

    def end_wait(self, seconds: float) -> None:
        """Record that a call that waits for other ranks has returned after so many seconds."""
        self._waited += seconds
        self.count += 1
