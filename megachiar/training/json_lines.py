"""A file of a run folder with one JSON record a line: each has the step that it belongs to, and all are one history."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_json
from megachiar.errors import disk_errors

_LARGEST = 1 << 40  # bytes of a file
_NAMED = 5  # damaged lines that a warning names
IsRecord = Callable[[dict[str, Any]], bool]
"""Says of a JSON object with a step whether it is a record of the file."""


class JsonLines:
    """Appends records to a file; rank 0 alone does so.

    A disk that refuses a record does not end the run: ``warn`` is called, and the next record is tried again.

    Args:
        path: of the file.
        step: step that the run continues from. Records of later steps, which a run wrote and then stopped before it
            saved, are removed, so that the file holds one history. A run at step 0 begins an empty one.
        warn: prints a line of the log.
        is_record: tells the file's records.

    Raises:
        UserError: the file cannot be opened.
    """

    def __init__(self, path: Path, step: int, warn: Callable[[str], None], is_record: IsRecord):
        self.path = path
        self._warn, self._is_record = warn, is_record
        self._lost = 0  # records since the last one that was written
        self._open(step)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record, which has a step."""
        try:
            self._append(json.dumps(without_nan(record)).encode() + b"\n")
        except OSError as error:
            if not self._lost:
                self._warn(f"{self.path} cannot be written: {error.strerror}. The run goes on without these records")
            self._lost += 1
        else:
            if self._lost:
                self._warn(f"{self.path} is written again; records that are missing: {self._lost}")
            self._lost = 0

    def rewind(self, step: int) -> None:
        """Remove the records of steps after ``step``, from which the run goes on once more."""
        self._file.close()
        self._open(step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self, step: int) -> None:
        self._forget_after(step)
        with disk_errors(self.path):
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (stays open as long as the run)

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
        records = [parse_line(line, self._is_record) for line in lines]
        # A kill may have cut the last line, which is no damage.
        if broken := [number for number, record in enumerate(records[:-1], 1) if record is None]:
            named = ", ".join(map(str, broken[:_NAMED])) + (" and more" if len(broken) > _NAMED else "")
            self._warn(f"{self.path}: {len(broken)} damaged lines are left out (line {named})")
        pairs = zip(lines, records, strict=True)
        kept = [line for line, record in pairs if step > 0 and record and record["step"] <= step]
        write_atomically(self.path, b"".join(line + b"\n" for line in kept))


def read_lines(path: Path, is_record: IsRecord) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the records of a file, oldest first, and the numbers from 1 of the lines that hold none.

    A last line that was cut by a kill, or that is being written, is neither.

    Raises:
        UserError: the file cannot be read.
    """
    records = [parse_line(line, is_record) for line in _lines(path)]
    damaged = [number for number, record in enumerate(records[:-1], 1) if record is None]
    return [record for record in records if record is not None], damaged


def _lines(path: Path) -> list[bytes]:
    """Return the lines of a file; a last line that was not written whole is one of them.

    Raises:
        UserError: the file cannot be read.
    """
    with disk_errors(path, "read"):
        *lines, last = read_regular(path, limit=_LARGEST).split(b"\n")
    return [*lines, last] if last else lines


def parse_line(line: bytes, is_record: IsRecord) -> dict[str, Any] | None:
    """Return the record of a line; None if it holds none."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    is_right = isinstance(record, dict) and _is_step(record.get("step")) and is_record(record)
    return record if is_right else None


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def finite(value: Any) -> float | None:
    """Return a number of a record; None for what is no number, not finite, or greater than any that a run has."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a damaged line may have an integer of any length
        return None


def without_nan(value: Any) -> Any:
    """Return ``value`` with None in place of nan and inf, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
