"""The numbers of a run, by the names that tables have for them; a number that the run does not have is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megachiar.planning.flops import forward_flops_of_attention, forward_flops_of_shares
from megachiar.reporting.reported_run import ReportedRun
from megachiar.training.final_evaluation import attention_shares, training_seconds
from megachiar.training.run_result import Measures

Values = dict[str, Any]
OF_TEXT = ("loss", "token_ppl", "word_ppl", "bits_per_byte")
OF_CLASSES = ("loss", "accuracy", "macro_f1")
MEASURES = tuple(dict.fromkeys((*OF_TEXT, *OF_CLASSES)))


def numbers_of(run: ReportedRun) -> Values:
    """Return what tables show of a run."""
    shares, rbf = shares_of_layers(run)
    found: Values = {
        "run": run.label,
        "variant": run.name.variant,
        "seed": run.seed,
        "kind": run.kind,
        "router": router_of(run),
        "parameters": run.parameters,
        "step": run.step,
        "steps": None if run.config is None else run.config.training.steps,
        "finished": run.result is not None,
        "tokens": run.tokens,
        **held_out(run),
        "attention_share": attention_share(run, shares),
        **flops_of(run, shares, rbf),
        "measured_on": measured_on(run),
        "training_seconds": run.result.training_seconds if run.result is not None else training_seconds(run.train),
        "commit": None if run.result is None else run.result.commit or run.result.created_by,
    }
    if run.result is not None:
        found["steps"] = run.result.steps
    return found


def held_out(run: ReportedRun) -> Values:
    """Return the measures of the first validation set and of the first test set of the run's main task."""
    found: Values = {}
    for name in run.main_sets[:1]:
        if (validation := run.validation_of(name)) is not None:
            step, measures = validation
            found |= {"validation_set": name, "validation_step": step, **measured(measures, "validation_")}
    if run.result is not None:
        for name in run.main_tests[:1]:
            found |= {"test_set": name, "test_step": run.result.best.step, **measured(run.result.test[name], "test_")}
    return found


def measured_on(run: ReportedRun) -> Any:
    """Return what two runs must share for their losses to be compared: the task, and the content of the sets."""
    if run.result is None:
        return None
    sets = [run.result.validation_data.get(name) for name in run.main_sets[:1]]
    sets += [run.result.test_data.get(name) for name in run.main_tests[:1]]
    contents = [(found.checksum, found.tokens, found.examples) for found in sets if found is not None]
    return run.classifies, contents


def measured(measures: Measures, prefix: str = "") -> Values:
    """Return the measures that tables show, each name behind ``prefix``."""
    return {f"{prefix}{name}": measures[name] for name in MEASURES if measures.get(name) is not None}


def router_of(run: ReportedRun) -> str | None:
    """Return the kind of router; None where no layer routes, or the config is not known."""
    if run.config is None or not run.config.model.routed_layers:
        return None
    return run.config.model.router.kind


def shares_of_layers(run: ReportedRun) -> tuple[list[float] | None, list[float] | None]:
    """Return each layer's share of tokens that took attention and RBF mixing as the tested checkpoint was reached.

    A run without a result has those of its last records.
    """
    shares: list[float] | None
    last = run.result.best.step if run.result is not None else max((r["step"] for r in run.train), default=0)
    if run.result is not None and run.result.attention_share_of_layers is not None:
        shares, first = run.result.attention_share_of_layers, run.result.shares_from_step
    else:
        shares, first = attention_shares(run.train, last)
    if shares is None:
        return None, None
    if run.config is None or "rbf" not in run.config.model.router.operators:
        return shares, [0.0] * len(shares) if run.config is not None else None
    steps = range(first or 0, last + 1)
    rows = [r["rbf_share"] for r in run.train if r.get("rbf_share") and r["step"] in steps]
    rows = [row for row in rows if len(row) == len(shares)]
    return shares, [sum(column) / len(rows) for column in zip(*rows, strict=True)] if rows else None


def attention_share(run: ReportedRun, shares: Sequence[float] | None) -> float | None:
    """Return the mean share of the routed layers; None where no layer routes or the run does not say it."""
    if run.result is not None:
        return run.result.attention_share
    if shares is None or run.config is None or len(shares) != run.config.model.num_layers:
        return None
    routed = [shares[layer] for layer in run.config.model.routed_layers]
    return sum(routed) / len(routed) if routed else None


def flops_of(run: ReportedRun, shares: Sequence[float] | None, rbf: Sequence[float] | None) -> Values:
    """Return the FLOPs of a forward pass of one token, and the share that routing saves against attention everywhere.

    A classification is counted without the head of a language model, whose place its own head takes.
    """
    config = run.config
    if config is None or shares is None or rbf is None or len(shares) != config.model.num_layers:
        return {}
    length = config.sequence_length
    routed = forward_flops_of_shares(config.model, length, shares, rbf)
    dense = forward_flops_of_attention(config.model, length)
    head = routed.head if run.classifies else 0.0
    here, there = routed.total - head, dense.total - head
    return {"flops_per_token": here, "attention_flops_per_token": there, "flops_saved": 1 - here / there}


def all_sets(run: ReportedRun) -> list[Values]:
    """Return a row of measures for each set that the run was measured on, those of all its tasks."""
    measured_sets = []
    for name in dict.fromkeys([*run.main_sets, *_measured_sets(run)]):
        if (validation := run.validation_of(name)) is not None:
            measured_sets.append(("validation", name, *validation))
    if run.result is not None:
        step = run.result.best.step
        measured_sets += [("test", name, step, measures) for name, measures in run.result.test.items()]
    whose = {"run": run.label, "kind": run.kind, "parameters": run.parameters}
    return [
        {**whose, "split": split, "set": name, "step": step, "data": _path(run, split, name), **_of_set(measures)}
        for split, name, step, measures in measured_sets
    ]


def _of_set(measures: Mapping[str, Any]) -> Values:
    counted = {key: measures[key] for key in ("tokens", "examples") if measures.get(key) is not None}
    return {**counted, **measured(dict(measures))}


def _measured_sets(run: ReportedRun) -> list[str]:
    recorded = [r["kind"].partition("/")[2] for r in run.records if r["kind"].startswith("evaluation/")]
    saved = [] if run.state is None else list(run.state.validation)
    return [*([] if run.result is None else run.result.validation), *recorded, *saved]


def _path(run: ReportedRun, split: str, name: str) -> str | None:
    """Return the prefix of the dataset of a set; None where it is not known."""
    if run.result is not None:
        records = run.result.validation_data if split == "validation" else run.result.test_data
        if name in records:
            return records[name].path
    if run.config is None:
        return None
    task = run.config.mixed.tasks.get(name)
    if split == "validation":
        found = run.config.data.validation.get(name) or (task.validation if task is not None else None)
    else:
        found = run.config.data.test.get(name) or (task.test if task is not None else None)
    return None if found is None else str(found)
