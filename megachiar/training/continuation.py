"""Everything that the start of a run checks before it has an engine; a dry run ends here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from megachiar.checkpoint.compatibility import (
    changed_keys,
    check_data,
    check_same_optimizer,
    check_same_tasks,
    read_compatible,
    weights_alone,
)
from megachiar.checkpoint.format import CONFIG_FILE, NOTHING_SPENT, CheckpointState, RecentSteps, Spent
from megachiar.config import RunConfig, load_config
from megachiar.config.run_length import asked_length
from megachiar.data.sampling.history_records import Change
from megachiar.topology import LaunchError
from megachiar.training.auxiliary_data import NOTHING_READ, TasksRead
from megachiar.training.document_ends import with_document_end
from megachiar.training.epochs import resolve_epochs
from megachiar.training.mixing import samples_of_tasks
from megachiar.training.run_data import (
    RunData,
    check_max_epochs,
    open_data,
)
from megachiar.training.run_tokenizer import check_kept_tokenizer, describe_other_tokenizer
from megachiar.training.schedule import learning_rate
from megachiar.training.start import Start


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps taken.
        samples: training samples that all ranks together have consumed.
        saved_step: step of the newest checkpoint in the run folder; None before the first.
        recent: the steps that the next one is compared with.
        rollbacks: how often the run went back to the checkpoint of ``saved_step``.
        spent: what the run had spent when this process began.
    """

    step: int = 0
    samples: int = 0
    saved_step: int | None = None
    recent: RecentSteps = field(default_factory=RecentSteps)
    rollbacks: int = 0
    spent: Spent = NOTHING_SPENT


@dataclass(frozen=True)
class Continuation:
    """A run at its start.

    Attributes:
        start: where it starts.
        state: the record of the checkpoint that it starts from; None for a fresh start.
        progress: how far it is.
        data: what it reads from there on.
        summary: what is loaded, as a line for the log.
        warnings: what is not as it was when the checkpoint was written, as lines for the log.
    """

    start: Start
    state: CheckpointState | None
    progress: Progress
    data: RunData
    summary: str
    warnings: list[str]


def open_run(config: RunConfig) -> tuple[RunConfig, RunData]:
    """Open the data of a new run.

    Returns:
        The config with the steps that its epochs make and with ``data.document_end`` where a mask needs it, and the
        data.

    Raises:
        LaunchError: a dataset is missing, damaged or too short, or does not fit the config or the other datasets.
    """
    config = resolve_epochs(config)
    data = open_data(config)
    return with_document_end(config, data), data


def continue_run(config: RunConfig, data: RunData, start: Start) -> Continuation:
    """Return the run of ``config`` as it is at its start, before anything is loaded.

    Args:
        config: as ``open_run`` returns it.
        data: of the config, as a new run would read it.
        start: what ``resolve_start`` decided.

    Raises:
        UserError: the checkpoint is damaged, holds another model, or has read data that ``data.on_change`` does not
            allow to change; the run would end before its start, or reads a source too often.
    """
    continuation = _continue_from(config, data, start)
    check_max_epochs(config, continuation.data)
    check_steps_left(config, start)
    return continuation


def check_steps_left(config: RunConfig, start: Start) -> None:
    """Check that a run which goes on from another one has a step to take.

    Raises:
        LaunchError: its last step is not after the other run's.
    """
    if start.kind == "all" and start.step >= config.steps:
        key, _ = asked_length(config.training)
        raise LaunchError(
            f"training.{key}",
            f"ends the run at step {config.steps:,}, but {start.path} is at step {start.step:,} already",
            f"raise training.{key}, or take the weights alone with checkpoint.load: weights",
        )


def check_moments(start: Start, state: CheckpointState) -> None:
    """Check that a checkpoint which a run goes on from has the state of the optimizer.

    Raises:
        LaunchError: it holds weights alone, as one that was imported.
    """
    if not state.has_moments:
        assert start.path is not None
        raise LaunchError(
            start.path,
            f"holds weights alone ({state.layout}): without optimizer state no run can go on from it",
            weights_alone(start.path, start.is_own),
        )


def _continue_from(config: RunConfig, data: RunData, start: Start) -> Continuation:
    path = start.path
    if path is None:
        return Continuation(start, None, Progress(), data, "fresh", [])
    state = read_compatible(path, config.model, start.is_own, weights_only=start.kind == "weights")
    if start.kind == "weights":
        summary = f"weights from {path}; optimizer, schedule and data start anew"
        warnings = describe_other_tokenizer(path, data.tokenizer_record)
        return Continuation(start, state, Progress(), data, summary, warnings)
    check_same_tasks(path, load_config(path / CONFIG_FILE), config, start.is_own)
    check_moments(start, state)
    check_same_optimizer(path, load_config(path / CONFIG_FILE), config, start.is_own)
    check_kept_tokenizer(path, data.tokenizer_record, start.is_own)
    changes = check_data(path, state, config, data.history, start.is_own)
    warnings = describe_changes(load_config(path / CONFIG_FILE), config, changes, state.step)
    check_auxiliary_data(path, state, config, data)
    check_draws(path, load_config(path / CONFIG_FILE), config)
    warnings += describe_other_validation(state, data)
    rollbacks = start.rollback.rollbacks if start.rollback is not None else 0
    if rollbacks:
        warnings.append(f"left out again: the samples of {rollbacks} bad steps after which the run went back to here")
    warnings += (start.history_after_rollback or state.data).describe_returning(data.history, state.step)
    what = "resumed from" if start.is_own else "weights, optimizer and position in the data from"
    return Continuation(
        start,
        state,
        Progress(
            step=state.step,
            samples=state.samples,
            saved_step=state.step if start.is_own else None,
            recent=state.recent,
            rollbacks=rollbacks,
            spent=state.spent,
        ),
        replace(
            data.continue_from(state.data, state.step, start.history_after_rollback),
            tasks_read=tasks_read(path, state, config),
        ),
        summary=f"{what} {path} ({state.layout}): step {state.step}, {state.samples:,} samples",
        warnings=warnings,
    )


def describe_changes(before: RunConfig, now: RunConfig, of_data: list[Change], step: int) -> list[str]:
    """Return a line for the log for everything that a run does otherwise than it did up to a checkpoint.

    Args:
        before: config of the checkpoint.
        now: config of the run that continues.
        of_data: what ``check_data`` found; these keys are told in its words.
        step: optimizer steps taken.
    """
    told = {change.key for change in of_data}
    changes = [(change.key, change.before, change.now) for change in of_data]
    changes += [
        (key, json.dumps(old), json.dumps(new)) for key, old, new in changed_keys(before, now) if key not in told
    ]
    lines = [f"{key} was {old} up to here and is {new} from here on" for key, old, new in changes]
    rates = learning_rate(before, step + 1), learning_rate(now, step + 1)
    if rates[0] != rates[1]:
        lines.append(
            f"learning rate of step {step + 1:,}: {rates[1]:.3e}, by the config of the checkpoint {rates[0]:.3e}"
        )
    return lines


def check_auxiliary_data(checkpoint: Path, state: CheckpointState, config: RunConfig, data: RunData) -> None:
    """Check that the auxiliary tasks of a run read what they read up to a checkpoint, unless ``data.on_change`` allows.

    Raises:
        LaunchError: a task has other data.
    """
    now = data.validation_records()
    for task in data.auxiliary:
        key = f"mixed.tasks.{task.name}"
        then = state.validation_data.get(key)
        if then is not None and not then.same_data(now[key]) and config.data.on_change == "refuse":
            raise LaunchError(
                f"{checkpoint}: {key}.data",
                f"was {then.path} with other content when it was saved: {now[key].path} would be read from its middle",
                "set it back, or set data.on_change to continue",
            )


_DRAWS = ("probability", "group_size", "seed")
_DRAWS_OF_TASK = ("weight", "global_batch_size")


def check_draws(checkpoint: Path, saved: RunConfig, config: RunConfig) -> None:
    """Check that a mixed run draws the batches of other tasks as up to a checkpoint, unless ``data.on_change`` allows.

    Raises:
        LaunchError: a key of the draws differs.
    """
    if config.data.on_change != "refuse" or not config.mixed.tasks:
        return
    values = [(f"mixed.{key}", getattr(saved.mixed, key), getattr(config.mixed, key)) for key in _DRAWS]
    for name, task in config.mixed.tasks.items():
        before = saved.mixed.tasks[name]  # the tasks are the same
        values += [(f"mixed.tasks.{name}.{key}", getattr(before, key), getattr(task, key)) for key in _DRAWS_OF_TASK]
    for key, then, now in values:
        if then != now:
            raise LaunchError(
                f"{checkpoint}: {key}",
                f"was {then} when it was saved and is {now} now: other batches would join the steps",
                "set it back, or set data.on_change to continue: every task then continues from where it is",
            )


def tasks_read(checkpoint: Path, state: CheckpointState, config: RunConfig) -> TasksRead:
    """Return how far the auxiliary tasks of ``config`` had read their data when ``checkpoint`` was saved."""
    read = state.auxiliary_samples
    if not read:  # checkpoints of earlier versions, whose runs never changed the draws
        read = samples_of_tasks(load_config(checkpoint / CONFIG_FILE), NOTHING_READ, state.samples)
    return TasksRead(state.samples, tuple(read[name] for name in config.mixed.tasks))


def describe_other_validation(state: CheckpointState, data: RunData) -> list[str]:
    """Return a line for the log for each validation set that holds other data than up to the checkpoint."""
    now = data.validation_records()
    changed = [name for name, then in state.validation_data.items() if name in now and not now[name].same_data(then)]
    keys = [name if name.startswith("mixed.") else f"data.validation.{name}" for name in changed]
    return [f"{key} holds other data than up to here: losses on it from here on are no sequel" for key in keys]


def describe_finished(config: RunConfig, progress: Progress) -> str | None:
    """Return what the log says of a run that has taken its last step already; None where steps are left."""
    if progress.step < config.steps:
        return None
    key, _ = asked_length(config.training)
    return (
        f"{config.logging.folder} is finished: it is at step {progress.step:,} of training.steps {config.steps:,}. To "
        f"train it further raise training.{key}; to begin another run name another logging.folder."
    )
