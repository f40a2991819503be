"""Compare runs with one another: their numbers side by side, the keys of the config that differ, and what misleads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megachiar.config.evaluation import TASK_PREFIX
from megachiar.data.sampling.history_records import SourceRecord
from megachiar.data.tokenizers.recorded import read_kept_record
from megachiar.errors import UserError
from megachiar.reporting.history import curve
from megachiar.reporting.measures import Values, numbers_of
from megachiar.reporting.reported_run import ReportedRun
from megachiar.reporting.table import Column, decimal, percent, short, text, whole
from megachiar.reporting.task_rows import asked_differently, best_of, task_measures
from megachiar.training.json_lines import finite, without_nan
from megachiar.training.metrics import EVALUATION

IGNORED_KEYS = ("logging.folder",)
"""Keys of the config that differ between any two runs."""


@dataclass(frozen=True)
class Measured:
    """A row of the comparison.

    Attributes:
        key: of the values of a run.
        column: heading, and how a value is shown.
        best: whether the least or the greatest value is the best; empty where neither is.
        needs: what must be the same in all runs for values to compare: nothing, ``data``, ``text``, where other
            tokens of the same text do, or ``tasks``.
    """

    key: str
    column: Column
    best: str = ""
    needs: str = ""


ROWS = (
    Measured("kind", text("model", "kind")),
    Measured("router", text("router", "router")),
    Measured("parameters", short("parameters", "parameters")),
    Measured("state", text("state", "state")),
    Measured("step", whole("step", "step")),
    Measured("tokens", short("tokens", "tokens")),
    Measured("validation_set", text("validation set", "validation_set")),
    Measured("best_validation_loss", decimal("best validation loss", "best_validation_loss", 4), "least", "data"),
    Measured("best_validation_step", whole("at step", "best_validation_step")),
    Measured("last_validation_loss", decimal("last validation loss", "last_validation_loss", 4), "least", "data"),
    Measured("last_validation_bits", decimal("last bits per byte", "last_validation_bits", 4), "least", "text"),
    Measured("validation_accuracy", percent("validation accuracy", "validation_accuracy"), "greatest", "data"),
    Measured("test_set", text("test set", "test_set")),
    Measured("test_loss", decimal("test loss", "test_loss", 4), "least", "data"),
    Measured("test_token_ppl", decimal("test perplexity", "test_token_ppl", 2), "least", "data"),
    Measured("test_bits_per_byte", decimal("test bits per byte", "test_bits_per_byte", 4), "least", "text"),
    Measured("test_accuracy", percent("test accuracy", "test_accuracy"), "greatest", "data"),
    Measured("attention_share", percent("attention share", "attention_share")),
    Measured("tokens_per_second", whole("tokens a second", "tokens_per_second"), "greatest"),
    Measured("utilisation", percent("MFU", "utilisation"), "greatest"),
    Measured("flops_per_token", short("FLOPs a token, forward", "flops_per_token"), "least"),
    Measured("flops_saved", percent("FLOPs saved by routing", "flops_saved"), "greatest"),
    Measured("flops", short("FLOPs of the run", "flops")),
    Measured("seconds", whole("seconds of the run", "seconds")),
    Measured("training_seconds", whole("seconds of its steps", "training_seconds")),
    Measured("commit", text("commit", "commit")),
)


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: their labels.
        measured: the rows, those of tasks included.
        values: of each run, by the keys of the rows.
        differences: of the config: each key that differs, with the value in each run; None where a run has no config.
        warnings: what a reader could be misled by, each in a sentence.
        incomparable: what ``Measured.needs`` names and the runs have not in common.
    """

    runs: list[str]
    measured: list[Measured]
    values: list[Values]
    differences: dict[str, list[Any]]
    warnings: list[str]
    incomparable: frozenset[str]

    def rows(self) -> list[tuple[Measured, list[str], int | None]]:
        """Return each row that a run has a value for, its cells, and the number of the best one; None for none."""
        found = []
        for measured in self.measured:
            cells = [measured.column.show(values) for values in self.values]
            if any(cells):
                found.append((measured, cells, self._best(measured)))
        return found

    def _best(self, measured: Measured) -> int | None:
        known = [(values[measured.key], place) for place, values in enumerate(self.values) if _has(values, measured)]
        if not measured.best or measured.needs in self.incomparable or len(known) < 2:
            return None
        chosen = min(known) if measured.best == "least" else max(known)
        return chosen[1] if [value for value, _ in known].count(chosen[0]) == 1 else None

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        runs = [without_nan({key.key: values.get(key.key) for key in self.measured}) for values in self.values]
        return {
            "runs": [{"run": name, **values} for name, values in zip(self.runs, runs, strict=True)],
            "config": {key: dict(zip(self.runs, values, strict=True)) for key, values in self.differences.items()},
            "warnings": self.warnings,
        }


def _has(values: Values, measured: Measured) -> bool:
    return finite(values.get(measured.key)) is not None


def compare_runs(runs: Sequence[ReportedRun]) -> Comparison:
    """Return the comparison of at least two runs."""
    values = [values_of(run) for run in runs]
    warnings, incomparable = warnings_of(runs, values)
    place = [measured.key for measured in ROWS].index("attention_share")
    return Comparison(
        runs=[run.label for run in runs],
        measured=[*ROWS[:place], *task_rows(runs), *ROWS[place:]],
        values=values,
        differences=config_differences(runs),
        warnings=warnings,
        incomparable=incomparable,
    )


def task_rows(runs: Sequence[ReportedRun]) -> list[Measured]:
    """Return a row for each measure of a task that a run has."""
    names = dict.fromkeys(name for run in runs for name in task_measures(run))
    return [
        Measured(name, decimal(f"last {name.removeprefix(TASK_PREFIX)}", name, 4), best_of(name, runs), "tasks")
        for name in names
    ]


def values_of(run: ReportedRun) -> Values:
    """Return the numbers of a run by the keys of ``ROWS`` and of its tasks; one that is not finite is nan."""
    found = {**numbers_of(run), **task_measures(run)}
    found["state"] = "finished" if run.result is not None else "not finished"
    for name in run.main_sets[:1]:
        losses = curve(run.records, f"{EVALUATION}{name}", "loss")
        bits = curve(run.records, f"{EVALUATION}{name}", "bits_per_byte")
        known = [(loss, step) for step, loss in zip(losses.x, losses.y, strict=True) if loss == loss]
        if known:
            best = min(known)
            found["best_validation_loss"], found["best_validation_step"] = best[0], int(best[1])
        if losses.y:
            found["last_validation_loss"] = losses.y[-1]
        if bits.y:
            found["last_validation_bits"] = bits.y[-1]
        found.setdefault("validation_set", name)
    for key, name in (("tokens_per_second", "tokens_per_second"), ("utilisation", "model_flops_utilisation")):
        rates = [record[name] for record in run.train if isinstance(record.get(name), int | float)]
        found[key] = statistics.median(rates[len(rates) // 2 :]) if rates else None
    last = run.train[-1] if run.train else {}
    found["flops"], found["seconds"] = last.get("flops"), last.get("elapsed_seconds")
    return found


def config_differences(runs: Sequence[ReportedRun]) -> dict[str, list[Any]]:
    """Return the keys of the config that are not the same in all runs that have one, with the value in each run."""
    flat = [None if run.config is None else run.config.flat() for run in runs]
    known = [keys for keys in flat if keys is not None]
    names = dict.fromkeys(name for keys in known for name in keys if name not in IGNORED_KEYS)
    return {
        name: [None if keys is None else keys.get(name) for keys in flat]
        for name in names
        if any(keys.get(name) != known[0].get(name) for keys in known)
    }


def warnings_of(runs: Sequence[ReportedRun], values: Sequence[Values]) -> tuple[list[str], frozenset[str]]:
    """Return what could mislead a reader, and what the runs have not in common, see ``Comparison``."""
    found: list[str] = []
    incomparable: set[str] = set()
    texts = {text_bytes(run) for run in runs}
    tokenizers = {print_ for run in runs if (print_ := tokenizer_of(run)) is not None}
    if len(tokenizers) > 1:
        found.append(
            "The runs have different tokenizers: losses and perplexities a token do not compare. " + _bits_of(texts)
        )
        incomparable |= {"data"} if len(texts) == 1 and None not in texts else {"data", "text"}
    elif (problem := _data_problem(runs)) is not None:
        incomparable |= {"data", "text"}
        found.append(f"{problem}: their losses do not compare, and neither do bits.")
    if len({run.classifies for run in runs}) > 1:
        incomparable |= {"data", "text"}
        found.append("Some runs are language models and some are classifications: their losses do not compare.")
    lengths = {run.config.sequence_length for run in runs if run.config is not None}
    if len(lengths) > 1:
        words = " and ".join(f"{length:,}" for length in sorted(lengths))
        found.append(f"Samples have {words} tokens: a model that sees more text before a token has a lower loss.")
    tokens = {row.get("tokens") for row in values}
    if len(tokens) > 1:
        found.append("The runs have trained on different numbers of tokens: compare their curves by tokens or FLOPs.")
    if asked := asked_differently(runs):
        incomparable.add("tasks")
        found += asked
    return found, frozenset(incomparable)


def _data_problem(runs: Sequence[ReportedRun]) -> str | None:
    """Return why losses on the main validation sets do not compare; None where all runs were measured on one text."""
    found = [validation_data(run) for run in runs]
    known = [record for record in found if record is not None]
    if any(not known[0].same_data(record) for record in known[1:]):
        return "The validation data of the runs differ"
    if len(known) < len(runs) and len({validation_path(run) for run in runs if run.main_sets}) > 1:
        names = ", ".join(run.label for run, record in zip(runs, found, strict=True) if record is None)
        return f"No checkpoint tells yet what {names} is validated on, and data.validation differs"
    measured = [_newest_evaluation(run) for run in runs]
    parts = {record.get("tokens") for record in measured if record is not None}
    if len(parts) > 1 and any(record is not None and not record.get("complete") for record in measured):
        return "The runs are validated on different parts of one text (training.evaluation_windows)"
    return None


def validation_path(run: ReportedRun) -> str | None:
    """Return the prefix of the dataset of a run's main validation set; None where no config tells."""
    names = run.main_sets[:1] if run.config is not None else []
    return str(run.config.data.validation[names[0]]) if names and run.config is not None else None


def _newest_evaluation(run: ReportedRun) -> Mapping[str, Any] | None:
    """Return the newest record of a run's main validation set; None without one."""
    kinds = [f"{EVALUATION}{name}" for name in run.main_sets[:1]]
    return next((record for record in reversed(run.records) if record["kind"] in kinds), None)


def _bits_of(texts: set[int | None]) -> str:
    """Return what a reader may do with bits per byte, by the sizes of the validation texts; None is unknown."""
    if len(texts - {None}) > 1:
        return "The validation texts have different sizes, so that bits per byte do not compare either."
    if texts and None not in texts:
        return "Compare bits per byte: the validation texts have the same size."
    return "Compare bits per byte, where both read the same text."


def text_bytes(run: ReportedRun) -> int | None:
    """Return the bytes of the text of a run's main validation set; None where no evaluation of all of it tells."""
    last = _newest_evaluation(run)
    if last is None or not (last.get("complete") and last.get("bits_per_byte")):
        return None
    return round(last["loss"] * last["tokens"] / math.log(2) / last["bits_per_byte"])


def tokenizer_of(run: ReportedRun) -> str | None:
    """Return the fingerprint of a run's tokenizer; None where the run folder does not keep its record."""
    if run.folder is None:
        return None
    try:
        kept = read_kept_record(run.folder)
    except UserError:
        return None
    return None if kept is None else kept.fingerprint


def validation_data(run: ReportedRun) -> SourceRecord | None:
    """Return what the main validation set of a run holds: of its result, or of its newest checkpoint."""
    for name in run.main_sets[:1]:
        if run.result is not None and name in run.result.validation_data:
            return run.result.validation_data[name]
        if run.state is not None and run.state.validation_data:
            return run.state.validation_data.get(name)
    return None
