"""How far a long job over text has come: a live bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
MEGA = 1_000_000


class TextProgress:
    """Shows megabytes and documents per second and the time left of a job whose input is ``total`` bytes.

    Attributes:
        text_bytes, documents: done so far.
        elapsed: seconds since the ``with`` block began.

    Args:
        label: what is being done, in a word.
        total: bytes of all inputs as they lie on the disk, None where unknown: no time left is shown then.
        stream: where to write; a bar if it is a terminal, plain lines if not.
        every: seconds between plain lines.
    """

    def __init__(
        self, label: str, total: int | None, stream: TextIO | None = None, every: float = SECONDS_BETWEEN_LINES
    ):
        self.label, self.total = label, total
        self.consumed = self.text_bytes = self.documents = 0
        self._stream, self._every = stream or sys.stderr, every
        self._bar: Progress | None = None

    def __enter__(self) -> TextProgress:
        self._start = self._last_line = time.monotonic()
        if self._stream.isatty():
            self._bar = _make_bar(Console(file=self._stream), self.total is not None)
            self._task = self._bar.add_task(self.label, total=self.total, rates="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def advance(self, consumed: int, text_bytes: int, documents: int) -> None:
        """Add to what is done: bytes of input read, bytes of text and documents made of them."""
        self.consumed += consumed
        self.text_bytes += text_bytes
        self.documents += documents
        if self._bar is not None:
            self._bar.update(self._task, completed=self.consumed, rates=self.rates())
        elif time.monotonic() - self._last_line >= self._every:
            self._last_line = time.monotonic()
            print(self.line(), file=self._stream, flush=True)

    def rates(self) -> str:
        """Such as ``4.2 MB/s, 1,021 documents/s``."""
        seconds = max(self.elapsed, 1e-9)
        return f"{self.text_bytes / seconds / MEGA:.1f} MB/s, {self.documents / seconds:,.0f} documents/s"

    def line(self) -> str:
        """The whole state in one line."""
        line = f"{self.label}: {self.documents:,} documents, {self.text_bytes / MEGA:,.1f} MB, {self.rates()}"
        if self.total and self.consumed:
            left = self.elapsed * max(0, self.total - self.consumed) / self.consumed
            line += f", {100 * self.consumed / self.total:.0f} %, {_clock(left)} left"
        return line


def _make_bar(console: Console, total_known: bool) -> Progress:
    start = [SpinnerColumn(), TextColumn("{task.description}")]
    end = [TextColumn("{task.fields[rates]}")]
    known = [BarColumn(), TaskProgressColumn()], [TextColumn("left"), TimeRemainingColumn()]
    columns = [*start, *known[0], *end, *known[1]] if total_known else [*start, *end]
    return Progress(*columns, console=console, transient=True)


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
