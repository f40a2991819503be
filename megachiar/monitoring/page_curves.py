"""Curves and rows of layers as pages draw them: thinned, in few digits, and against steps, tokens, time and FLOPs."""

from __future__ import annotations

import bisect
import math
from typing import Any, Literal, NamedTuple

from megachiar.monitoring.curves import Curve, thinned
from megachiar.monitoring.run_history import LayerRows, RunHistory
from megachiar.training.metrics import EVALUATION, TRAIN

AXES = {"step": "steps", "tokens": "tokens", "elapsed_seconds": "time", "flops": "FLOPs"}
"""What curves are drawn against, by the key of a record, in words."""
MOST_POINTS = 1000  # of a curve on a page
MOST_COLUMNS = 256  # of rows of layers
_DIGITS = 7  # a float32 has no more


class ChartKind(NamedTuple):
    """A chart of a page.

    Attributes:
        id: of its element.
        title: in words.
        unit: of the values, in words; may be empty.
        form: how numbers are written: ``decimal``, ``percent``, ``scientific`` or ``whole``.
        values: of a record of a step, by the name of the curve.
        of_sets: value of a record of an evaluation, which has a curve for each validation set; None for none.
        has_log: whether a logarithmic axis makes sense.
        of_tasks: whether it has the measures of tasks: ``shares`` those that stay from 0 to 1, ``others`` the rest.
    """

    id: str
    title: str
    unit: str
    form: str
    values: dict[str, str]
    of_sets: str | None = None
    has_log: bool = False
    of_tasks: Literal["shares", "others"] | None = None


CHARTS = (
    ChartKind("loss", "Loss", "nats a token", "decimal", {"train": "mean_loss"}, "loss", has_log=True),
    ChartKind("bits_per_byte", "Bits per byte", "", "decimal", {}, "bits_per_byte", has_log=True),
    ChartKind("accuracy", "Accuracy", "", "percent", {}, "accuracy"),
    ChartKind("tasks", "Tasks", "", "decimal", {}, of_tasks="shares"),
    ChartKind("task_values", "Tasks, other measures", "", "decimal", {}, has_log=True, of_tasks="others"),
    ChartKind("throughput", "Throughput", "tokens a second", "whole", {"tokens a second": "tokens_per_second"}),
    ChartKind("utilisation", "Model FLOPs utilisation", "", "percent", {"MFU": "model_flops_utilisation"}),
    ChartKind("learning_rate", "Learning rate", "", "scientific", {"learning rate": "learning_rate"}),
    ChartKind("gradient_norm", "Gradient norm", "before clipping", "decimal", {"norm": "gradient_norm"}, has_log=True),
    ChartKind("gate", "Gate g of layer 1", "", "decimal", {"g": "gate"}),
)
LAYER_CHARTS = {
    "attention_share": ("Attention share by layer", "percent"),
    "rbf_share": ("Share of RBF mixing by layer", "percent"),
    "entropy": ("Mean spectral entropy H by layer", "decimal"),
}


def series_of(history: RunHistory, chart: ChartKind, prefix: str = "") -> list[dict[str, Any]]:
    """Return the curves of a chart; ``prefix`` stands before their names, and without it they have their own."""
    found = []
    for name, value in chart.values.items():
        curve = history.losses if value == "mean_loss" else history.curve(TRAIN, value)
        newest = history.newest_loss if value == "mean_loss" else history.newest(TRAIN, value)
        if curve.steps:
            found.append(_series(f"{prefix}{name}", curve, newest, history, dots=False))
    for name in history.sets if chart.of_sets is not None else []:
        curve = history.curve(f"{EVALUATION}{name}", chart.of_sets or "")
        newest = history.newest(f"{EVALUATION}{name}", chart.of_sets or "")
        if curve.steps:
            found.append(_series(f"{prefix}{name}", curve, newest, history, dots=True))
    for name, curve in history.tasks.items() if chart.of_tasks is not None else []:
        if all(0 <= value <= 1 for value in curve.values) == (chart.of_tasks == "shares"):
            found.append(_series(f"{prefix}{name}", curve, history.newest_of_task(name), history, dots=True))
    return found


def _series(name: str, curve: Curve, newest: float | None, history: RunHistory, dots: bool) -> dict[str, Any]:
    """Return a curve; ``is_lost`` says that its newest value is not finite, which no curve can show."""
    is_lost = newest is not None and math.isnan(newest)
    return {"name": name, **points(curve, history), "dots": dots, "is_lost": is_lost}


def points(curve: Curve, history: RunHistory) -> dict[str, Any]:
    """Return the points of a curve: ``x`` by the names of ``AXES``, as far as the run has recorded them, and ``y``."""
    kept = thinned(curve.steps, curve.values, MOST_POINTS)
    steps = [curve.steps[place] for place in kept]
    x: dict[str, list[float]] = {"step": list(steps)}
    for axis in AXES:
        along = history.curve(TRAIN, axis)
        if axis != "step" and along.steps:
            x[axis] = [short(value) for value in _along(steps, along)]
    return {"x": x, "y": [short(curve.values[place]) for place in kept]}


def _along(steps: list[int], axis: Curve) -> list[float]:
    """Return the value of ``axis`` at each step: recorded, or in proportion between two records, from 0 at step 0."""
    known, values = [0, *axis.steps], [0.0, *axis.values]
    found = []
    for step in steps:
        place = min(max(1, bisect.bisect_left(known, step)), len(known) - 1)
        before, after = known[place - 1], known[place]
        share = (step - before) / (after - before) if after > before else 1.0
        found.append(values[place - 1] + share * (values[place] - values[place - 1]))
    return found


def layer_chart(name: str, rows: LayerRows) -> dict[str, Any] | None:
    """Return the rows of a value of each layer as a page draws them; None where no layer ever had any."""
    known = [value for row in rows.rows for value in row if value is not None]
    if not known or (name == "rbf_share" and not any(known)):
        return None
    title, form = LAYER_CHARTS[name]
    every = -(-len(rows.rows) // MOST_COLUMNS)
    kept = sorted({*range(0, len(rows.rows), every), len(rows.rows) - 1})
    is_share = form == "percent"
    return {
        "id": name,
        "title": title,
        "form": form,
        "low": 0.0 if is_share else short(min(known)),
        "high": 1.0 if is_share else short(max(known)),
        "steps": [rows.steps[place] for place in kept],
        "rows": [[None if value is None else short(value) for value in rows.rows[place]] for place in kept],
    }


def short(value: float) -> float:
    """Return a number with the digits that a float32 has; a whole one stays as it is."""
    return value if float(value).is_integer() else float(f"{value:.{_DIGITS}g}")
