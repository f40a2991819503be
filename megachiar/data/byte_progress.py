"""Progress of work that is measured in bytes of known total: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_EVERY = 10.0  # seconds


@contextmanager
def byte_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress on standard error while the block runs.

    Args:
        what: done to the bytes, such as ``"merging"``.
        total: bytes in all.

    Yields:
        a function to call with the number of bytes done since its last call.
    """
    if sys.stderr.isatty():
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(TextColumn(what), *columns, console=Console(file=sys.stderr), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda size: bar.advance(task, size)
    else:
        yield _LinesInLog(what, total)


class _LinesInLog:
    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._began = self._shown = time.monotonic()

    def __call__(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        if now - self._shown >= LINE_EVERY:
            self._shown = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate
            print(
                f"{self._what}: {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s, "
                f"{left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )
