"""The metrics of a run: ``metrics.jsonl``, one JSON record a line, which the run's trackers get as well."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_json
from megachiar.errors import disk_errors

if TYPE_CHECKING:  # who reads the metrics needs neither trackers nor torch
    from megachiar.training.trackers.run_trackers import RunTrackers

METRICS_FILE = "metrics.jsonl"
TRAIN, SKIPPED, ROLLBACK, EVALUATION = "train", "skipped", "rollback", "evaluation/"
"""Kinds of records: of steps that were taken, of a step that was left out, of a rollback; of a set the name follows."""
_LARGEST = 1 << 40  # bytes of metrics.jsonl
_NAMED = 5  # damaged lines that a warning names


class MetricsWriter:
    """Write each record to ``metrics.jsonl``, and hand it to the trackers; rank 0 alone does so.

    A disk that refuses a record does not end the run: ``warn`` is called, and the next record is tried again.

    Args:
        folder: the run folder.
        step: step that the run continues from. Records of later steps, which a run wrote and then stopped before it
            saved, are removed, so that the file holds one history.
        warn: prints a line of the log.
        trackers: of the run; None for none.

    Raises:
        UserError: the file cannot be opened.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None], trackers: RunTrackers | None = None):
        self.path = folder / METRICS_FILE
        self.trackers = trackers
        self._warn = warn
        self._lost = 0  # records since the last one that was written
        self._open(step)

    def _open(self, step: int) -> None:
        self._forget_after(step)
        with disk_errors(self.path):
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (stays open as long as the run)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Append one record of ``step``; a list has one value a layer."""
        try:
            self._append(json.dumps({"step": step, "kind": kind, **without_nan(values)}).encode() + b"\n")
        except OSError as error:
            if not self._lost:
                self._warn(f"{self.path} cannot be written: {error.strerror}. The run goes on without these records")
            self._lost += 1
        else:
            if self._lost:
                self._warn(f"{self.path} is written again; records that are missing: {self._lost}")
            self._lost = 0
        if self.trackers is not None:
            self.trackers.log(step, kind, values)

    def rewind(self, step: int) -> None:
        """Remove the records of steps after ``step``, from which the run goes on once more."""
        self._file.close()
        self._open(step)
        if self.trackers is not None:
            self.trackers.rewind(step)

    def close(self) -> None:
        """Close the file, and let the trackers send what is left."""
        self._file.close()
        if self.trackers is not None:
            self.trackers.close()

    def _append(self, line: bytes) -> None:
        """Append ``line`` whole or not at all.

        Raises:
            OSError: the disk refuses it.
        """
        end = os.fstat(self._file.fileno()).st_size
        left = memoryview(line)
        try:
            while left:  # the system may take a part, and says at the next call why not all
                left = left[self._file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), end)
            raise

    def _forget_after(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = _lines(self.path)
        records = [parse_record(line) for line in lines]
        # A kill may have cut the last line, which is no damage.
        if broken := [number for number, record in enumerate(records[:-1], 1) if record is None]:
            named = ", ".join(map(str, broken[:_NAMED])) + (" and more" if len(broken) > _NAMED else "")
            self._warn(f"{self.path}: {len(broken)} damaged lines are left out (line {named})")
        kept = [line for line, record in zip(lines, records, strict=True) if record and record["step"] <= step]
        write_atomically(self.path, b"".join(line + b"\n" for line in kept))


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records of a run's ``metrics.jsonl``, oldest first; only those of ``kind`` if it is given.

    Lines that hold no record are left out: ``MetricsWriter`` warns of them.

    Raises:
        UserError: the file cannot be read.
    """
    return [record for record in read_all_lines(folder)[0] if kind in (None, record["kind"])]


def read_all_lines(folder: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the records of a run's ``metrics.jsonl``, and the numbers from 1 of the lines that hold none.

    A last line that was cut by a kill, or that is being written, is neither.

    Raises:
        UserError: the file cannot be read.
    """
    records = [parse_record(line) for line in _lines(folder / METRICS_FILE)]
    damaged = [number for number, record in enumerate(records[:-1], 1) if record is None]
    return [record for record in records if record is not None], damaged


def _lines(path: Path) -> list[bytes]:
    """Return the lines of ``metrics.jsonl``; a last line that was not written whole is one of them.

    Raises:
        UserError: the file cannot be read.
    """
    with disk_errors(path, "read"):
        *lines, last = read_regular(path, limit=_LARGEST).split(b"\n")
    return [*lines, last] if last else lines


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line of ``metrics.jsonl``; None if it holds none."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int and isinstance(record.get("kind"), str)
    return record if is_record else None


def without_nan(value: Any) -> Any:
    """Return ``value`` with None in place of nan and inf, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
