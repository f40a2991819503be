"""A long job shows how far it is: by a live bar on a terminal, by a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress  # imported where a bar is shown, since lines in a log file need none

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_PICTURES = 0.1  # of the bar
MEGA = 1_000_000

Shown = TypeVar("Shown", bound="ByteProgress")


class ByteProgress:
    """Show rate and time left of a job over ``total`` bytes while a ``with`` block runs.

    Attributes:
        consumed: bytes done so far.
        elapsed: seconds since the block began.

    Args:
        label: one word for the job.
        total: bytes of all inputs on the disk. None if they are unknown; then no time left is shown.
        stream: the file to write to, standard error if None. A terminal gets a bar, any other file plain lines.
        every: seconds between plain lines.
    """

    def __init__(
        self, label: str, total: int | None, stream: TextIO | None = None, every: float = SECONDS_BETWEEN_LINES
    ):
        self.label, self.total, self.consumed = label, total, 0
        self._stream, self._every = stream or sys.stderr, every
        self._bar: Progress | None = None

    def __enter__(self: Shown) -> Shown:
        self._start = self._last_line = time.monotonic()
        if self._stream.isatty():
            self._bar = _make_bar(self._stream, self.total is not None)
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
        """Seconds since the block began."""
        return time.monotonic() - self._start

    def advance(self, consumed: int) -> None:
        """Count ``consumed`` more bytes as done."""
        self.consumed += consumed
        if self._bar is not None:
            self._bar.update(self._task, completed=self.consumed, rates=_joined(self.rates(), self._left()))
            if time.monotonic() - self._last_line >= SECONDS_BETWEEN_PICTURES:
                self._last_line = time.monotonic()
                self._bar.refresh()
        elif time.monotonic() - self._last_line >= self._every:
            self._last_line = time.monotonic()
            print(self.line(), file=self._stream, flush=True)

    def line(self) -> str:
        """Return the whole state in one line."""
        share = f"{100 * self.consumed / self.total:.0f} %" if self.total else ""
        return f"{self.label}: {_joined(self.amount(), self.rates(), share, self._left())}"

    def amount(self) -> str:
        """Return the amount that is done, such as ``11.0 MB``."""
        return _megabytes(self.consumed)

    def rates(self) -> str:
        """Return the rate, such as ``4.2 MB/s``."""
        return f"{_megabytes(self.per_second(self.consumed))}/s"

    def per_second(self, amount: int) -> float:
        """Return ``amount`` divided by the seconds so far."""
        return amount / max(self.elapsed, 1e-9)

    def _left(self) -> str:
        """Return the time left, such as ``0:01:30 left``; an empty text where it is unknown."""
        if not self.total or not self.consumed:
            return ""
        seconds = round(self.elapsed * max(0, self.total - self.consumed) / self.consumed)
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"


class TextProgress(ByteProgress):
    """Show the text's megabytes and the documents of a job that makes documents of its input.

    Attributes:
        text_bytes: bytes of text made so far.
        documents: documents made so far.
    """

    text_bytes = documents = 0

    def advance(self, consumed: int, text_bytes: int = 0, documents: int = 0) -> None:
        """Count more as done: bytes of input, and the bytes of text and documents that were made of them."""
        self.text_bytes += text_bytes
        self.documents += documents
        super().advance(consumed)

    def amount(self) -> str:
        """Return the amount that is done, such as ``1,021 documents, 4.2 MB``."""
        return f"{self.documents:,} documents, {_megabytes(self.text_bytes)}"

    def rates(self) -> str:
        """Return both rates, such as ``4.2 MB/s, 1,021 documents/s``."""
        documents = self.per_second(self.documents)
        return f"{_megabytes(self.per_second(self.text_bytes))}/s, {documents:,.0f} documents/s"


class CountProgress(ByteProgress):
    """Show how many of ``total`` items are done, such as sequences that a model has run; ``unit`` names them."""

    def __init__(self, label: str, total: int, unit: str, stream: TextIO | None = None):
        super().__init__(label, total, stream)
        self._unit = unit

    def amount(self) -> str:
        """Return the amount that is done, such as ``1,021 sequences``."""
        return f"{self.consumed:,} {self._unit}"

    def rates(self) -> str:
        """Return the rate, such as ``12.5 sequences/s``."""
        return f"{self.per_second(self.consumed):,.1f} {self._unit}/s"


def _make_bar(stream: TextIO, total_known: bool) -> Progress:
    """Return a bar that has no thread, since processes that a job forks must not inherit a thread's locks."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

    share = [BarColumn(), TaskProgressColumn()] if total_known else []
    columns = [SpinnerColumn(), TextColumn("{task.description}"), *share, TextColumn("{task.fields[rates]}")]
    return Progress(*columns, console=Console(file=stream), transient=True, auto_refresh=False)


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _megabytes(size: float) -> str:
    return f"{size / MEGA:,.1f} MB"
