"""What happened to a run and when, as lines of ``RUN/events.jsonl``: starts, saves, bad steps, rollbacks, ends.

    {"time": 1790000000.0, "step": 250, "kind": "saved", "checkpoint": "step_00000250", "seconds": 0.4}

``metrics.jsonl`` forgets the steps that are taken once more; this file only grows. ``time`` is in seconds since 1970.
A run that was killed has no event of its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megachiar.data.storage.regular_file import check_regular
from megachiar.training.json_lines import without_nan

EVENTS_FILE = "events.jsonl"
START, SAVED, BAD_STEP, ROLLED_BACK = "start", "saved", "bad step", "rollback"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
ENDS = (FINISHED, STOPPED, FAILED)
"""Kinds of events; one of ``ENDS`` is the last of a start that was not killed."""


class RunEvents:
    """Append events; it never raises, and a disk that refuses one is a line of the log.

    Args:
        folder: the run folder; None writes nothing, as on all ranks but rank 0.
        warn: prints a line of the log.
    """

    def __init__(self, folder: Path | None, warn: Callable[[str], None]):
        self._path = None if folder is None else folder / EVENTS_FILE
        self._warn, self._has_warned, self._has_started = warn, False, False

    def start(self, step: int, values: dict[str, Any]) -> None:
        """Write that the run starts after ``step``; a line that a kill has cut is ended first."""
        self._has_started = True
        if self._path is not None:
            with contextlib.suppress(OSError):
                check_regular(self._path)
                if self._path.stat().st_size and self._path.read_bytes()[-1:] != b"\n":
                    self._append(b"\n")
        self.write(START, step, values)

    def write(self, kind: str, step: int, values: dict[str, Any] | None = None) -> None:
        """Write an event of a run that has started; one that has not belongs to nobody's history."""
        if self._path is None or not self._has_started:
            return
        event = {"time": time.time(), "step": step, "kind": kind, **without_nan(values or {})}
        try:
            self._append(json.dumps(event).encode() + b"\n")
        except OSError as error:
            if not self._has_warned:
                self._warn(f"{self._path} cannot be written: {error.strerror}. The run goes on without its events")
            self._has_warned = True

    def _append(self, content: bytes) -> None:
        assert self._path is not None
        if self._path.exists():
            check_regular(self._path)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, content)
        finally:
            os.close(descriptor)
