"""The metrics of a run: ``metrics.jsonl``, one JSON record a line, which the run's trackers get as well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachiar.training.json_lines import JsonLines, parse_line, read_lines
from megachiar.training.samples_file import Sample, SamplesFile

if TYPE_CHECKING:  # who reads the metrics needs neither trackers nor torch
    from megachiar.training.trackers.run_trackers import RunTrackers

METRICS_FILE = "metrics.jsonl"
TRAIN, SKIPPED, ROLLBACK, EVALUATION = "train", "skipped", "rollback", "evaluation/"
"""Kinds of records: of steps that were taken, of a step that was left out, of a rollback; of a set the name follows."""


class MetricsWriter:
    """Write each record to ``metrics.jsonl``, and hand it to the trackers; rank 0 alone does so.

    Samples of what the run writes go to ``samples.jsonl`` instead. What a disk refuses does not end the run.

    Args:
        folder: the run folder.
        step: step that the run continues from, see ``JsonLines``.
        warn: prints a line of the log.
        trackers: of the run; None for none.

    Raises:
        UserError: a file cannot be opened.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None], trackers: RunTrackers | None = None):
        self.path = folder / METRICS_FILE
        self.trackers = trackers
        self._lines = JsonLines(self.path, step, warn, _is_record)
        self._samples = SamplesFile(folder, step, warn)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Append one record of ``step``; a list has one value a layer."""
        self._lines.write({"step": step, "kind": kind, **values})
        if self.trackers is not None:
            self.trackers.log(step, kind, values)

    def write_samples(self, step: int, samples: list[Sample]) -> None:
        """Append what the run writes after ``step``."""
        self._samples.write(step, samples)
        if self.trackers is not None:
            self.trackers.log_texts(step, samples)

    def rewind(self, step: int) -> None:
        """Remove the records of steps after ``step``, from which the run goes on once more."""
        self._lines.rewind(step)
        self._samples.rewind(step)
        if self.trackers is not None:
            self.trackers.rewind(step)

    def close(self) -> None:
        """Close the files, and let the trackers send what is left."""
        self._lines.close()
        self._samples.close()
        if self.trackers is not None:
            self.trackers.close()


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
    return read_lines(folder / METRICS_FILE, _is_record)


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line of ``metrics.jsonl`` or ``events.jsonl``; None if it holds none."""
    return parse_line(line, _is_record)


def _is_record(record: dict[str, Any]) -> bool:
    return isinstance(record.get("kind"), str)
