"""The log of a run on a console: a progress bar on a terminal, and a line now and then in any case."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Show how far a run is.

    Args:
        console: to print on; a quiet one or one that is no terminal gets no progress bar.
        steps: optimizer steps of the whole run.
        done: steps taken before this process started.
    """

    def __init__(self, console: Console, steps: int, done: int):
        self.console = console
        self.steps = steps
        self._began = time.monotonic()
        self._done_before = done
        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        self._progress = None
        if console.is_terminal and not console.quiet:
            self._progress = Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task("", total=steps, completed=done, note="")

    @contextmanager
    def running(self) -> Iterator[Display]:
        """Show the progress bar, on a terminal, as long as the context lasts."""
        if self._progress is None:
            yield self
            return
        with self._progress:
            yield self

    def advance(self, step: int, loss: float) -> None:
        """Move the bar to ``step`` and show ``loss``, in nats a token, beside it."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, note=f"loss {loss:.4f}")

    def line(self, text: str) -> None:
        """Print one line of the log, in rich's markup."""
        self.console.print(text)

    def time_left(self, step: int) -> str:
        """Return the time from ``step`` to the last step, such as ``1h05m``, at the mean rate of this process."""
        rate = (time.monotonic() - self._began) / max(1, step - self._done_before)
        seconds = round(rate * (self.steps - step))
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"
