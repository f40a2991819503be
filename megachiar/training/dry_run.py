"""``--dry-run``: print what a run would compute, hold and send, without building its weights.

It refuses data, checkpoint and layout that the start of training would refuse, by the same functions, and writes
nothing. It does not look for what the machine must have: kernels, apex, a compiler, a run folder that can be written.
A plan is often made on another machine than the one that trains.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megachiar.checkpoint.compatibility import read_compatible
from megachiar.config import RunConfig
from megachiar.config.run_length import asked_length
from megachiar.data.storage.files import idx_path
from megachiar.model import build_model
from megachiar.planning.rank_plan import RankPlan, plan_ranks
from megachiar.planning.step_tokens import step_flops, step_tokens
from megachiar.topology import data_parallel_size
from megachiar.training.continuation import (
    check_moments,
    check_steps_left,
    continue_run,
    describe_finished,
    open_run,
)
from megachiar.training.describe_data import describe_data
from megachiar.training.epochs import resolve_epochs
from megachiar.training.start import check_resume, find_start


def print_plan(config: RunConfig, world_size: int | None) -> None:
    """Print the resolved config and after it the plan, on standard output.

    Args:
        config: of the run.
        world_size: ranks to plan for; None takes the ranks that are started, or else those that the config asks for.

    Raises:
        UserError: the layout does not fit the ranks, or data or checkpoint do not allow the run.
    """
    ranks = world_size or _planned_ranks(config)
    data_size = data_parallel_size(config, ranks)
    config, notes = _check(config)
    sys.stdout.write(config.to_yaml())
    sys.stdout.flush()
    console = Console(width=110)
    table = Table(title=escape(f"plan of {config.logging.folder}"), show_header=False, title_justify="left")
    for name, value in _rows(config, ranks, data_size):
        table.add_row(name, escape(value))
    console.print(table)
    console.print(_ranks_table(plan_ranks(config, data_size)))
    for note in notes:
        console.print(note)


def _rows(config: RunConfig, ranks: int, data_size: int) -> list[tuple[str, str]]:
    training, parallel = config.training, config.parallel
    tokens = training.global_batch_size * config.sequence_length
    share = config.model.expected_attention_share
    flops = step_flops(config, config.model)
    baseline = step_flops(config, config.model.model_copy(update={"kind": "baseline"}))
    rows = " with sequence parallelism" if parallel.sequence else ""
    layout = f"pp {parallel.pipeline_size} x tp {parallel.tensor_size}{rows} x dp {data_size} = {ranks} ranks"
    accumulation = training.global_batch_size // (training.micro_batch_size * data_size)
    return [
        ("parameters", f"{build_model(config.model, seed=0, device='meta', heads=config.heads).parameter_count():,}"),
        ("layout", f"{layout}, ZeRO {parallel.zero_stage}, {config.precision.compute}"),
        ("tokens a step", f"{tokens:,} ({accumulation} micro-batches of {training.micro_batch_size} on each replica)"),
        ("tokens in all", _length(config, tokens)),
        *_tokens_of_other_tasks(config),
        ("FLOPs a step", f"{flops:.3e} at attention share {share:.2f} of routed layers"),
        ("  against all attention", f"{flops / baseline:.1%} of {baseline:.3e}"),
    ]


def _tokens_of_other_tasks(config: RunConfig) -> list[tuple[str, str]]:
    """Return the row about the other tasks of a mixed run; none for other runs."""
    if not config.mixed.tasks:
        return []
    main = config.training.global_batch_size * config.sequence_length
    expected = step_tokens(config).total - main
    return [("  of other tasks", f"{expected:,.0f} on average, of {', '.join(config.mixed.tasks)}")]


def _length(config: RunConfig, tokens_of_a_step: int) -> str:
    key, value = asked_length(config.training)
    if config.training.steps is None:
        return f"{value:g} epochs of data.train, which is not on this machine"
    asked = "" if key == "steps" else f", from training.{key} {value:,g}"
    return f"{tokens_of_a_step * config.steps:,} in {config.steps:,} steps{asked}"


def _ranks_table(stages: list[RankPlan]) -> Table:
    """Return a table of memory and traffic of a rank of each stage; of more than 4, the first, fullest and last."""
    fullest = max(range(len(stages)), key=lambda number: stages[number].memory.total)
    shown = range(len(stages)) if len(stages) <= 4 else sorted({0, fullest, len(stages) - 1})
    table = Table(title="one rank of a stage on a GPU, without what libraries hold (estimate)", title_justify="left")
    table.add_column("")
    for number in shown:
        layers = stages[number].layers
        table.add_column(f"stage {number}: layers {layers.start + 1} to {layers.stop}", justify="right")
    plans = [stages[number] for number in shown]
    memory, traffic = [plan.memory for plan in plans], [plan.communication for plan in plans]
    rows = [
        ("parameters", [f"{plan.parameters:,}" for plan in plans]),
        *_muon_rows(plans),
        ("memory", [gib(m.total) for m in memory]),
        ("  weights", [gib(m.parameters) for m in memory]),
        ("  gradients", [gib(m.gradients) for m in memory]),
        ("  optimizer", [gib(m.optimizer) for m in memory]),
        ("  buffers", [gib(m.buffers) for m in memory]),
        ("  activations, all kept", [gib(m.activations_kept) + (" (not this run)" * m.recomputes) for m in memory]),
        (
            "  activations, recomputed",
            [gib(m.activations_recomputed) + " (not this run)" * (not m.recomputes) for m in memory],
        ),
        ("host memory of a checkpoint that is written", [gib(plan.snapshot) for plan in plans]),
        ("sent a step in the tensor-parallel group", [gib(t.tensor) for t in traffic]),
        ("  to other stages", [gib(t.pipeline) for t in traffic]),
        ("  to other replicas", [gib(t.data) for t in traffic]),
    ]
    for name, values in rows:
        table.add_row(name, *values)
    return table


def _muon_rows(plans: list[RankPlan]) -> list[tuple[str, list[str]]]:
    """Return the rows of what Muon trains and computes on each rank; none where AdamW trains all."""
    if not any(plan.muon.parameters for plan in plans):
        return []
    trained, computed = [f"{plan.muon.parameters:,}" for plan in plans], [f"{plan.muon.flops:.3e}" for plan in plans]
    return [("  trained by Muon", trained), ("  FLOPs of its step", computed)]


def _planned_ranks(config: RunConfig) -> int:
    """Return the number of ranks that are started, or that the config asks for where one process runs alone."""
    parallel = config.parallel
    replica = parallel.pipeline_size * parallel.tensor_size
    started = int(os.environ.get("WORLD_SIZE", "1"))
    return started if started > 1 else replica * (parallel.data_size or 1)


def _check(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Check what the start of training checks; a plan is often made on a machine that lacks the run's datasets.

    Returns:
        The config, resolved as far as the datasets allow, and what the log of the run would say, as lines of markup.
    """
    notes: list[str] = []
    of_tasks = [
        path for task in config.mixed.tasks.values() for path in (task.data, task.validation, task.test) if path
    ]
    missing = _missing([*config.data.prefixes, *of_tasks])
    if missing:
        if not _missing(source.path for source in config.data.train):
            config = resolve_epochs(config)
        names = escape(", ".join(map(str, missing)))
        notes.append(f"these datasets are not on this machine, so that they were not checked: {names}")
    else:
        config, data = open_run(config)
    start = find_start(config, notes.append)
    check_resume(config, start)
    if missing:
        if start.path is not None:
            state = read_compatible(start.path, config.model, start.is_own, weights_only=start.kind == "weights")
            if start.continues_from is not None:
                check_moments(start, state)
            if config.training.steps is not None:
                check_steps_left(config, start)
        return config, notes
    run = continue_run(config, data, start)
    finished = describe_finished(config, run.progress)
    said = [f"start: {run.summary}", *run.warnings, *describe_data(config, run.data), *([finished] if finished else [])]
    return config, [*notes, *map(escape, said)]


def _missing(prefixes: Iterable[Path]) -> list[Path]:
    return [prefix for prefix in prefixes if not idx_path(prefix).exists()]


def gib(size: float) -> str:
    """Return ``size`` bytes as text, in MiB or GiB."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"
