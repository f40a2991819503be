"""The measures of tasks as rows of a comparison: ``evaluation.tasks`` of each run, as it was measured last."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megachiar.config.evaluation import TASK_PREFIX
from megachiar.reporting.history import number
from megachiar.reporting.reported_run import ReportedRun

ASKED_BY = ("evaluation.num_fewshot", "evaluation.limit")
"""Keys of the config that change what a task measures of the same model."""


def task_measures(run: ReportedRun) -> dict[str, float]:
    """Return the newest measures of a run's tasks by name, such as ``eval/cloze/acc``; nan for what is not finite."""
    newest: dict[str, Mapping[str, Any]] = {}
    if run.result is not None:
        newest |= {kind: measures.last for kind, measures in run.result.tasks.items() if measures.last is not None}
    newest |= {record["kind"]: record for record in run.records if record["kind"].startswith(TASK_PREFIX)}
    return {name: value for kind, record in newest.items() for name, value in _measures_in(kind, record)}


def _measures_in(kind: str, record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for metric, value in record.items():
        if metric not in ("step", "kind") and (value is None or not math.isnan(number(value))):
            yield f"{kind}/{metric}", number(value)


def best_of(name: str, runs: Sequence[ReportedRun]) -> str:
    """Return whether the ``least`` or the ``greatest`` value of a measure is the best; empty where no run tells."""
    for run in runs:
        if run.result is not None and (found := run.result.best_of_each.get(name)) is not None:
            return "greatest" if found.higher_is_better else "least"
        if run.state is not None and name in run.state.validation:
            return "greatest" if name in run.state.maximised else "least"
    return ""


def asked_differently(runs: Sequence[ReportedRun]) -> list[str]:
    """Return a warning for each key that changes what tasks measure and is not the same in all runs with tasks."""
    configs = [run.config.flat() for run in runs if run.config is not None and run.config.evaluation.tasks]
    found = []
    for key in ASKED_BY:
        values = list(dict.fromkeys(config.get(key) for config in configs))
        if len(values) > 1:
            words = " and ".join("not set" if value is None else str(value) for value in values)
            found.append(f"{key} is {words}: what tasks measure does not compare.")
    return found
