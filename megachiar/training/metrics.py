"""What a run writes down: metrics.jsonl, TensorBoard, and a line for the reader."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megachiar.data.storage.files import write_atomically
from megachiar.errors import disk_errors


class MetricsWriter:
    """Writes each record to ``metrics.jsonl`` and TensorBoard; rank 0 only.

    Args:
        folder: the run folder.
        tensorboard: whether to write event files.
        step: step the run goes on from. Records after it, of a run that was stopped before it saved, are dropped, so
            that the file tells one history.
    """

    def __init__(self, folder: Path, tensorboard: bool, step: int):
        self.path = folder / "metrics.jsonl"
        self._forget_after(step)
        with disk_errors(self.path):
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with disk_errors(folder):
                self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Append one record; lists (one value a layer) become one TensorBoard curve a layer."""
        with disk_errors(self.path):
            self._file.write(json.dumps({"step": step, "kind": kind, **_without_nan(values)}) + "\n")
            self._file.flush()
        if self._tensorboard is None:
            return
        for name, value in values.items():
            many = isinstance(value, list)
            for tag, number in (
                [(f"{name}/layer_{i + 1:02d}", v) for i, v in enumerate(value)] if many else [(name, value)]
            ):
                if isinstance(number, (int, float)) and math.isfinite(number):
                    self._tensorboard.add_scalar(f"{kind}/{tag}", number, step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _forget_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        write_atomically(self.path, "".join(line + "\n" for line in kept).encode())


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Records of a run's metrics.jsonl, oldest first; only those of ``kind`` if given."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if kind in (None, record["kind"])]


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # the last line of a killed run
        return math.inf


def _without_nan(value: Any) -> Any:
    """``value`` with nan and inf as null: JSON has neither."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank has held: allocated on its GPU, or resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Display:
    """The run as a person follows it: a bar on a terminal, a line now and then in any case."""

    def __init__(self, console: Console, steps: int, done: int):
        self.console, self.steps = console, steps
        self._began, self._done_before = time.monotonic(), done
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        columns += (TextColumn("{task.fields[note]}"),)
        live = console.is_terminal and not console.quiet
        self._progress = Progress(*columns, console=console, transient=True) if live else None
        self._task = self._progress.add_task("", total=steps, completed=done, note="") if self._progress else None

    @contextmanager
    def running(self) -> Iterator[Display]:
        if self._progress is None:
            yield self
            return
        with self._progress:
            yield self

    def advance(self, step: int, loss: float) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step, note=f"loss {loss:.4f}")

    def line(self, text: str) -> None:
        self.console.print(text)

    def time_left(self, step: int) -> str:
        """Time to the last step at the mean rate since this process started."""
        rate = (time.monotonic() - self._began) / max(1, step - self._done_before)
        seconds = round(rate * (self.steps - step))
        hours, minutes = divmod(seconds // 60, 60)
        return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"
