"""Show a comparison of runs: on a terminal, as CSV, and as a page with the curves of all runs together."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from megachiar.data.storage.files import write_atomically
from megachiar.monitoring.one_line import one_line
from megachiar.monitoring.page_curves import AXES, CHARTS, ChartKind, series_of
from megachiar.monitoring.run_page import POLICY
from megachiar.monitoring.watched_run import WatchedRun
from megachiar.reporting.comparison import Comparison
from megachiar.reporting.table import NOTHING
from megachiar.viewer.page import as_data, build_page, parts_of

GENERATOR = b'<meta name="generator" content="megachiar compare">'


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the numbers, the keys of the config that differ, and the warnings."""
    table = RichTable(title="Runs", title_justify="left")
    table.add_column("")
    for name in comparison.runs:
        table.add_column(Text(one_line(name)), justify="right", overflow="fold")
    for measured, cells, best in comparison.rows():
        shown = [
            Text(one_line(cell) or NOTHING, style="bold green" if n == best else "") for n, cell in enumerate(cells)
        ]
        table.add_row(Text(one_line(measured.column.heading)), *shown)
    console.print(table)
    if comparison.differences:
        keys = RichTable(title="Config: what differs", title_justify="left")
        keys.add_column("key", overflow="fold")
        for name in comparison.runs:
            keys.add_column(Text(one_line(name)), overflow="fold")
        for key, values in comparison.differences.items():
            keys.add_row(Text(one_line(key)), *(Text(one_line(shown_value(value))) for value in values))
        console.print(keys)


def shown_value(value: Any) -> str:
    """Return a value of a config in words."""
    return NOTHING if value is None else str(value)


def comparison_csv(comparison: Comparison) -> str:
    """Return a row for each run with all digits; a missing value is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *(measured.key for measured in comparison.measured)])
    for name, values in zip(comparison.runs, comparison.values, strict=True):
        writer.writerow([name, *(values.get(measured.key) for measured in comparison.measured)])
    return text.getvalue()


def write_comparison_page(path: Path, comparison: Comparison, runs: Sequence[WatchedRun]) -> None:
    """Write the page of a comparison, whole or not at all.

    Args:
        path: of the page.
        comparison: of the runs.
        runs: the same, as they were read last; a run without curves has none.

    Raises:
        UserError: the disk refuses it.
    """
    record = {
        "runs": comparison.runs,
        "rows": [
            {"name": measured.column.heading, "cells": [cell or NOTHING for cell in cells], "best": best}
            for measured, cells, best in comparison.rows()
        ],
        "differences": [[key, *map(shown_value, values)] for key, values in comparison.differences.items()],
        "warnings": comparison.warnings,
        "axes": AXES,
        "charts": comparison_charts(comparison, runs),
    }
    title = f"Comparison: {', '.join(comparison.runs)}"
    parts = parts_of("megachiar.monitoring", "compare.html", "charts.css", ("charts.js", "compare.js"))
    write_atomically(path, build_page(title, as_data(record, None), POLICY, parts).encode("utf-8", "replace"))


def comparison_charts(comparison: Comparison, runs: Sequence[WatchedRun]) -> list[dict[str, Any]]:
    """Return the charts of the page, each with one curve a run: a value of training, or of one validation set."""
    charts = []
    for kind in CHARTS:
        if kind.values:
            title = "Training loss" if kind.id == "loss" else kind.title
            charts.append(_chart(kind._replace(title=title, of_sets=None), runs, None))
        sets = dict.fromkeys(name for run in runs for name in run.history.sets) if kind.of_sets is not None else {}
        for name in sets:
            needs = "text" if kind.id == "bits_per_byte" else "data"
            unit = f"{kind.unit} (does not compare)".strip() if needs in comparison.incomparable else kind.unit
            title = f"{kind.title} on {name}"
            charts.append(_chart(kind._replace(id=f"{kind.id}-{name}", title=title, unit=unit, values={}), runs, name))
        tasks = dict.fromkeys(name for run in runs for name in run.history.tasks) if kind.id == "tasks" else {}
        for name in tasks:
            unit = "does not compare" if "tasks" in comparison.incomparable else ""
            charts.append(_task_chart(kind._replace(id=f"tasks-{name}", title=name, unit=unit), runs, name))
    return [chart for chart in charts if chart["series"]]


def _task_chart(kind: ChartKind, runs: Sequence[WatchedRun], name: str) -> dict[str, Any]:
    """Return the chart of a measure of a task."""
    curves = [run.history.tasks.get(name) for run in runs]
    is_share = all(0 <= value <= 1 for curve in curves if curve is not None for value in curve.values)
    shares = _chart(kind, runs, name)
    others = _chart(kind._replace(of_tasks="others"), runs, name)
    series = sorted([*shares["series"], *others["series"]], key=lambda found: found["colour"])
    return {**shares, "series": series, "has_log": not is_share}


def _chart(kind: ChartKind, runs: Sequence[WatchedRun], of_set: str | None) -> dict[str, Any]:
    series = []
    for number, run in enumerate(runs):
        for found in series_of(run.history, kind):
            if of_set in (None, found["name"]):
                series.append({**found, "name": run.name, "colour": number})
    described = {"id": kind.id, "title": kind.title, "unit": kind.unit, "form": kind.form, "has_log": kind.has_log}
    return {**described, "series": series}
