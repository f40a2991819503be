"""One history out of the records of a run, and curves out of the history.

A run that was started again may have left steps twice in a copied or older ``metrics.jsonl``: where a step comes that
is not later than the one before it, the records from it on were those of an earlier start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megachiar.errors import UserError
from megachiar.reporting.notes import Notes
from megachiar.training.json_lines import finite
from megachiar.training.metrics import read_all_lines

Record = Mapping[str, Any]
_NAMED = 5  # damaged lines that a note names


class Curve(NamedTuple):
    """Points of a curve, as many of one as of the other; a value that was not finite is nan.

    Attributes:
        x: steps or tokens.
        y: values.
    """

    x: list[float]
    y: list[float]


def read_history(folder: Path, label: str, notes: Notes) -> list[Record]:
    """Return the records of the run in ``folder`` as one history; nothing where they are gone, which is noted."""
    if not (folder / "metrics.jsonl").exists():
        notes.add(label, "has no metrics.jsonl, and so no curves")
        return []
    try:
        records, damaged = read_all_lines(folder)
    except UserError as error:
        notes.add(label, error)
        return []
    if damaged:
        named = ", ".join(map(str, damaged[:_NAMED])) + (" and more" if len(damaged) > _NAMED else "")
        notes.add(label, f"{len(damaged)} damaged lines of metrics.jsonl are left out (line {named})")
    kept = one_history(records)
    if len(kept) < len(records):
        lost = len(records) - len(kept)
        notes.add(label, f"metrics.jsonl has steps twice: of {lost} records those of the last start count")
    return kept


def one_history(records: Sequence[Record]) -> list[Record]:
    """Return the records without those of steps that a later start has repeated."""
    kept: list[Record] = []
    for record in records:
        while kept and kept[-1]["step"] > record["step"]:
            kept.pop()
        if (place := _place_of(kept, record)) is not None:
            del kept[place:]
        kept.append(record)
    return kept


def _place_of(records: Sequence[Record], wanted: Record) -> int | None:
    """Return the place of the last record that is of the step and kind of ``wanted``; None if there is none."""
    for place in range(len(records) - 1, -1, -1):
        if records[place]["step"] != wanted["step"]:
            return None
        if records[place]["kind"] == wanted["kind"]:
            return place
    return None


def curve(records: Sequence[Record], kind: str, value: str) -> Curve:
    """Return ``value`` of the records of ``kind`` against their steps; records without this key are left out."""
    points = [
        (record["step"], number(record[value])) for record in records if record["kind"] == kind and value in record
    ]
    return Curve([float(step) for step, _ in points], [found for _, found in points])


def against_tokens(found: Curve, records: Sequence[Record]) -> Curve | None:
    """Return a curve of steps against the tokens that had been read then; None where the run does not record them."""
    known = [(r["step"], r["tokens"]) for r in records if r["kind"] == "train" and type(r.get("tokens")) is int]
    if not known or not found.x:
        return None
    steps, tokens = zip((0, 0), *known, strict=True)
    return Curve(np.interp(found.x, steps, tokens).tolist(), found.y)


def layer_curves(records: Sequence[Record], value: str) -> list[Curve]:
    """Return a curve for each layer of a value that the records of kind ``train`` have as a list."""
    rows = [r for r in records if r["kind"] == "train" and isinstance(r.get(value), list) and r[value]]
    rows = [row for row in rows if len(row[value]) == len(rows[-1][value])]
    steps = [float(row["step"]) for row in rows]
    columns = zip(*([number(item) for item in row[value]] for row in rows), strict=True)
    return [Curve(steps, list(column)) for column in columns]


def number(value: Any) -> float:
    """Return a number of a record; nan for None, which stands for a number that was not finite."""
    known = finite(value)
    return math.nan if known is None else known
