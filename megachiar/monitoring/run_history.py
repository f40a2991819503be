"""The history of a run out of its ``metrics.jsonl``, kept up to date while the run appends to it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megachiar.config.evaluation import TASK_PREFIX
from megachiar.monitoring.curves import Curve
from megachiar.training.json_lines import finite
from megachiar.training.metrics import EVALUATION, ROLLBACK, SKIPPED, TRAIN

OF_LAYERS = ("attention_share", "rbf_share", "entropy")
"""Values of a record that are lists with a number for each layer."""
LOSSES = ("mean_loss", "loss")
"""Names of the loss in a record of a step, the better one first; one of an evaluation has the second."""
MOST_ROWS = 1024

Record = Mapping[str, Any]


@dataclass
class LayerRows:
    """A value of each layer over steps.

    Attributes:
        steps: of the rows.
        rows: numbers by layer; None where a layer has none.
    """

    steps: list[int] = field(default_factory=list)
    rows: list[list[float | None]] = field(default_factory=list)
    _every: int = 1
    _seen: int = 0

    def add(self, step: int, row: list[float | None]) -> None:
        """Add the newest row, in place of the one before it where that was between those that are kept."""
        if self.rows and (self._seen - 1) % self._every:
            self.steps.pop()
            self.rows.pop()
        self.steps.append(step)
        self.rows.append(row)
        self._seen += 1
        if len(self.rows) > MOST_ROWS:
            self._every *= 2
            self.steps, self.rows = self.steps[::2], self.rows[::2]

    def forget_from(self, step: int) -> None:
        """Leave out the rows of ``step`` and of later ones."""
        place = bisect.bisect_left(self.steps, step)
        if place < len(self.steps):
            del self.steps[place:], self.rows[place:]
            self._seen = max(0, (place - 1) * self._every + 1)  # the newest row that is left is one of those kept


class RunHistory:
    """What the records of a run say, in bounded memory.

    A step that comes again, in a copied file or one of an earlier version, is that of a later start: what was known of
    it and of the steps after it is forgotten.

    Attributes:
        curves: by kind of record and name of value, such as ``("train", "mean_loss")``.
        layers: by name, of ``OF_LAYERS``.
        last: the newest record of each kind.
        marks: the newest records of rollbacks and of steps that were left out.
        step: of the newest record of a step; 0 without one.
        damaged: lines that hold no record.
    """

    def __init__(self) -> None:
        self.curves: dict[tuple[str, str], Curve] = {}
        self.layers: dict[str, LayerRows] = {}
        self.last: dict[str, Record] = {}
        self.marks: list[Record] = []
        self.step = 0
        self.damaged = 0

    @property
    def sets(self) -> list[str]:
        """Names of the validation sets that were measured, in order of their first measurement."""
        kinds = dict.fromkeys(kind for (kind, _), curve in self.curves.items() if curve.steps)
        return [kind.removeprefix(EVALUATION) for kind in kinds if kind.startswith(EVALUATION)]

    @property
    def tasks(self) -> dict[str, Curve]:
        """The measures of tasks by their name ``TASK/METRIC``, in order of their first measurement."""
        found = {f"{kind}/{name}": curve for (kind, name), curve in self.curves.items() if kind.startswith(TASK_PREFIX)}
        return {name.removeprefix(TASK_PREFIX): curve for name, curve in found.items() if curve.steps}

    def curve(self, kind: str, name: str) -> Curve:
        """Return the curve of a value; one without points where no record has it."""
        return self.curves.get((kind, name), Curve())

    @property
    def losses(self) -> Curve:
        """Training loss: the mean since the record before, where the run has recorded it, and else of single steps."""
        found = [self.curve(TRAIN, name) for name in LOSSES]
        return found[0] if found[0].steps else found[1]

    def latest(self, name: str) -> float | None:
        """Return a number of the newest record of a step; None where it has none."""
        return finite(self.last.get(TRAIN, {}).get(name))

    def newest(self, kind: str, name: str) -> float | None:
        """Return a value of the newest record of a kind: nan where it is not finite any more; None where it has none.

        A file of JSON has null both for a number that is not finite and for one that is not known. What has been a
        number before, and every loss, is known.
        """
        record = self.last.get(kind, {})
        value = finite(record.get(name))
        is_known = name in LOSSES or bool(self.curve(kind, name).steps)
        return math.nan if value is None and name in record and is_known else value

    def newest_of_task(self, name: str) -> float | None:
        """Return the newest value of a measure of a task by its name in ``tasks``, see ``newest``."""
        kinds = {f"{kind}/{value}": (kind, value) for kind, value in self.curves}
        return self.newest(*kinds[f"{TASK_PREFIX}{name}"])

    @property
    def newest_loss(self) -> float | None:
        """Training loss of the newest record, as ``losses`` has it; nan where it is not finite."""
        name = next((name for name in LOSSES if name in self.last.get(TRAIN, {})), "")
        return self.newest(TRAIN, name)

    def take(self, records: Iterable[Record]) -> None:
        """Add records, oldest first."""
        for record in records:
            self._take(record)

    def _take(self, record: Record) -> None:
        step, kind = record["step"], record["kind"]
        if kind == TRAIN:
            if step <= self.step:
                self._forget_from(step)
            self.step = step
        elif kind in (ROLLBACK, SKIPPED):
            self.marks = [*self.marks[-99:], record]
        elif kind in self.last and self.last[kind]["step"] >= step:
            self._forget_from(step, kind)
        self.last[kind] = record
        for name, value in record.items():
            if name in ("step", "kind"):
                continue
            if name in OF_LAYERS and isinstance(value, list):
                self._add_row(name, step, value)
            elif (found := finite(value)) is not None:
                self.curves.setdefault((kind, name), Curve()).add(step, found)

    def _add_row(self, name: str, step: int, value: list[Any]) -> None:
        row = [finite(item) for item in value]
        rows = self.layers.setdefault(name, LayerRows())
        if rows.rows and len(rows.rows[-1]) != len(row):
            rows = self.layers[name] = LayerRows()
        rows.add(step, row)

    def _forget_from(self, step: int, kind: str | None = None) -> None:
        """Forget ``step`` and the later ones: of all kinds, or of one kind alone."""
        for (of, _), curve in self.curves.items():
            if kind in (None, of):
                curve.forget_from(step)
        self.last = {of: record for of, record in self.last.items() if kind not in (None, of) or record["step"] < step}
        if kind is None:
            for rows in self.layers.values():
                rows.forget_from(step)
