"""What a run has recorded of its steps, which a replay follows and compares itself with.

    metrics.jsonl    {"step": 7, "kind": "skipped", ...}              step 7 was left out
                     {"step": 10, "kind": "train", "skipped": 1}      one of the steps since the record before it was

Runs of earlier versions have no records of kind ``skipped``. Incidents then tell the steps, or the count itself does:
where it is 0, or as large as the number of steps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megachiar.engine.step_metrics import StepResult
from megachiar.errors import UserError
from megachiar.training.incident_record import IncidentRecord, find_incidents, read_incident
from megachiar.training.metrics import SKIPPED, TRAIN, read_metrics

_ROUNDING = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
"""Relative difference of two losses that two devices may compute of one step; ten times as much for gradient norms."""


@dataclass(frozen=True)
class RecordedStep:
    """Numbers of a step as the run recorded them; None where it recorded none, nan where a number was not finite."""

    loss: float | None
    gradient_norm: float | None
    learning_rate: float | None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RecordedStep:
        """Return what ``values``, read from JSON, say."""
        names = ("loss", "gradient_norm", "learning_rate")
        return cls(*(_number(values[name]) if name in values else None for name in names))

    def difference(self, result: StepResult, learning_rate: float, compute: Literal["fp32", "bf16", "fp16"]) -> str:
        """Return how a repeated step differs from this record by more than rounding; nothing if it does not.

        Args:
            result: of the repeated step.
            learning_rate: of the repeated step.
            compute: the type that the run computes in.
        """
        rounding = _ROUNDING[compute]
        pairs = {
            "loss": (self.loss, result.loss, rounding),
            "gradient norm": (self.gradient_norm, result.gradient_norm, 10 * rounding),
            "learning rate": (self.learning_rate, learning_rate, 1e-9),
        }
        return ", ".join(
            f"{name} {_told(here)} where the run recorded {_told(recorded)}"
            for name, (recorded, here, tolerance) in pairs.items()
            if recorded is not None and not _is_close(recorded, here, tolerance)
        )


@dataclass(frozen=True)
class RecordedSteps:
    """Some steps of a run.

    Attributes:
        numbers: what is recorded of a step, by its number.
        skipped: the steps that are known to be left out.
        taken: the steps that are known to be taken.
        unknown: lines for the log about steps that were left out, and which ones is not known.
    """

    numbers: Mapping[int, RecordedStep]
    skipped: Collection[int]
    taken: Collection[int]
    unknown: Sequence[str]


NO_STEPS = RecordedSteps({}, (), (), ())


def read_recorded_steps(run: Path, wanted: range) -> RecordedSteps:
    """Return what metrics and incidents of a run say of the steps ``wanted``; nothing where they are gone."""
    try:
        records = read_metrics(run)
    except UserError:
        records = []
    numbers = {
        record["step"]: RecordedStep.of(record)
        for record in records
        if record["kind"] in (TRAIN, SKIPPED) and record["step"] in wanted
    }
    skipped = {record["step"] for record in records if record["kind"] == SKIPPED}
    taken: set[int] = set()
    unknown = []
    before = 0
    for record in records:
        if record["kind"] != TRAIN:
            continue
        since, before = range(before + 1, record["step"] + 1), record["step"]
        here = range(max(since.start, wanted.start), min(since.stop, wanted.stop))
        count = record.get("skipped")
        if not here or type(count) is not int:  # the first versions told only whether the step itself was left out
            skipped |= {before} if count is True else set()
            continue
        if count > _count(skipped, since):
            skipped |= (
                set(here) if count == len(since) else {step for step in _left_out_incidents(run) if step in since}
            )
        if count <= _count(skipped, since) or count == len(since):
            taken |= set(here) - skipped
        else:
            unknown.append(
                f"{count} of the steps {since.start} to {before} were left out and the run has not recorded which: the "
                "replay may take them"
            )
    return RecordedSteps(numbers, skipped, taken, unknown)


def recorded_in(record: IncidentRecord) -> RecordedStep:
    """Return the numbers of a step that left an incident."""
    return RecordedStep.of({**record.result, "learning_rate": record.learning_rate})


def _count(steps: Collection[int], among: range) -> int:
    return sum(step in among for step in steps)


def _left_out_incidents(run: Path) -> set[int]:
    """Return the steps whose incident says that they were left out."""
    steps = set()
    for path in find_incidents(run):
        with contextlib.suppress(UserError):
            if (record := read_incident(path)).action == "left out":
                steps.add(record.step)
    return steps


def _number(value: Any) -> float | None:
    if value is None:
        return math.nan
    return float(value) if type(value) in (int, float) else None


def _is_close(one: float, other: float, tolerance: float) -> bool:
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.isfinite(one) == math.isfinite(other)
    return math.isclose(one, other, rel_tol=tolerance)


def _told(number: float) -> str:
    return f"{number:.6g}" if math.isfinite(number) else "not finite"
