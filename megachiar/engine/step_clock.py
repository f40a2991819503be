"""Split the time of steps into phases: data, forward, backward, optimizer, and communication within them.

    host      |data|--- forward ---|------ backward ------|- optimizer -|      a CPU: by the host's clock
                        |com|            |com| |com|          |com|            counted once: forward is without its com
    stream    ( e ) ....... ( e )( e ) ............. ( e )( e ) ..... ( e )    a GPU: by events e in the stream

A GPU works behind the host, which only puts events into its stream. They are read steps later, when they are done: the
host never waits for them. A time on a GPU is therefore that of its stream, which stands still where data is late or
other ranks are. Communication on another stream beside the computation costs no time there, and is not counted.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch

from megachiar import phases

PHASES = ("data", "forward", "backward", "optimizer")
COMMUNICATION = "communication"
Item = TypeVar("Item")


class StepClock:
    """Measures phases by the host's clock, where the host waits for all that it starts: on a CPU.

    Args:
        known: the phases that can be told apart; those that a run cannot tell are None in its results.
    """

    def __init__(self, known: tuple[str, ...] = PHASES):
        self._known = known
        self._sums = dict.fromkeys((*known, COMMUNICATION), 0.0)
        self._steps = 0
        self._is_in_step = False

    def begin_step(self) -> None:
        """Begin a step; communication before it, such as that of a save, is not counted."""
        self._is_in_step = True

    def end_step(self) -> None:
        """End a step."""
        self._is_in_step = False
        self._steps += 1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what this context does, without its communication, as a part of phase ``name``."""
        began, communication = time.perf_counter(), self._sums[COMMUNICATION]
        with phases.phase(name):
            yield
        inside = self._sums[COMMUNICATION] - communication
        self._sums[name] += time.perf_counter() - began - inside

    @contextlib.contextmanager
    def communicating(self) -> Iterator[None]:
        """Measure what this context does as communication, if it is a step's."""
        if not self._is_in_step or threading.current_thread() is not threading.main_thread():
            yield
            return
        began = time.perf_counter()
        yield
        self._sums[COMMUNICATION] += time.perf_counter() - began

    def reading(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield ``items``, and measure how long each takes as phase ``data``."""
        while True:
            with self.phase("data"):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def take(self) -> dict[str, float | None]:
        """Return the mean seconds a step of each phase since the last call; None for what is not known."""
        steps, sums = self._steps, self._sums
        self._steps, self._sums = 0, dict.fromkeys(sums, 0.0)
        return {name: sums[name] / steps if steps and name in sums else None for name in (*PHASES, COMMUNICATION)}


class _Span(NamedTuple):
    """Two events in a stream around a part of a step; ``inside`` is the phase that a communication belongs to."""

    name: str
    start: Any
    end: Any
    inside: str | None = None


class EventClock(StepClock):
    """Measures phases by events in the stream of a GPU, which are read when they are done.

    Args:
        known: as ``StepClock`` has it.
        new_event: returns an event with ``record``, ``query`` and ``elapsed_time``, as ``torch.cuda.Event`` has them.
        stream: returns the stream of this thread; communication in another one than the step's is not counted.
    """

    def __init__(
        self,
        known: tuple[str, ...] = PHASES,
        new_event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True),
        stream: Callable[[], Any] = lambda: torch.cuda.current_stream(),
    ):
        super().__init__(known)
        self._new_event, self._stream = new_event, stream
        self._of_step: Any = None
        self._phase: str | None = None
        self._spans: list[_Span] = []
        self._waiting: deque[list[_Span]] = deque()

    def begin_step(self) -> None:
        """Begin a step in the present stream."""
        super().begin_step()
        self._of_step = self._stream()
        self._spans = []

    def end_step(self) -> None:
        """End a step, and read the steps that the GPU has ended by now."""
        self._is_in_step = False
        self._waiting.append(self._spans)
        while self._waiting and all(span.end.query() for span in self._waiting[0]):
            self._add(self._waiting.popleft())

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Put events around what this context starts."""
        start = self._recorded()
        self._phase = name
        with phases.phase(name):
            yield
        self._phase = None
        self._spans.append(_Span(name, start, self._recorded()))

    @contextlib.contextmanager
    def communicating(self) -> Iterator[None]:
        """Put events around a step's communication, unless it goes beside the computation or is a save's."""
        is_other = threading.current_thread().name.startswith("megachiar") or self._stream() != self._of_step
        if not self._is_in_step or is_other:
            yield
            return
        start = self._recorded()
        yield
        self._spans.append(_Span(COMMUNICATION, start, self._recorded(), self._phase))

    def _recorded(self) -> Any:
        event = self._new_event()
        event.record()
        return event

    def _add(self, spans: list[_Span]) -> None:
        self._steps += 1
        for span in spans:
            seconds = span.start.elapsed_time(span.end) / 1000
            self._sums[span.name] += seconds
            if span.inside is not None:
                self._sums[span.inside] -= seconds


def step_clock(device: torch.device, stages: int) -> StepClock:
    """Return the clock of a run on ``device``.

    In a pipeline of several ``stages`` forward and backward passes and the optimizer's step interleave within one call
    of DeepSpeed's, and cannot be told apart from outside.
    """
    known = PHASES if stages == 1 else ("data",)
    return EventClock(known) if device.type == "cuda" else StepClock(known)
