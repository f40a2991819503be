"""Load into the engine what its run starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.markup import escape

from megachiar.checkpoint.compatibility import changed_keys, check_data
from megachiar.checkpoint.format import CONFIG_FILE, read_state
from megachiar.checkpoint.resume import load_weights, resume
from megachiar.config import RunConfig, load_config
from megachiar.data.sampling.history import Change
from megachiar.engine.engine import Engine
from megachiar.training.run_data import RunData
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
    """

    step: int = 0
    samples: int = 0
    saved_step: int | None = None


def restore(engine: Engine, data: RunData, start: Start, log: Callable[[str], None]) -> tuple[Progress, RunData]:
    """Load the checkpoint of ``start`` into ``engine``, if there is one; every rank calls this function.

    Args:
        engine: with initial weights.
        data: of the config, as a new run would read it.
        start: what ``resolve_start`` decided.
        log: prints a line of the log.

    Returns:
        How far the run is, and the data that it reads from there on.

    Raises:
        UserError: the checkpoint is damaged, holds another model, or has read data that ``data.on_change`` does not
            allow to change.
    """
    if start.path is None:
        return Progress(), data
    if start.kind == "weights":
        load_weights(engine, start.path)
        log(f"weights from {start.path}; optimizer, schedule and data start anew")
        for line in describe_other_tokenizer(start.path, data.tokenizer_record):
            log(f"[yellow]  {escape(line)}[/]")
        return Progress(), data
    check_kept_tokenizer(start.path.parent.parent, data.tokenizer_record)
    changes = check_data(start.path, read_state(start.path), engine.config, data.history)
    state = resume(engine, start.path)
    what = "resumed from" if start.kind == "resumed" else "weights, optimizer and position in the data from"
    log(f"{what} {start.path} ({state.layout}): step {state.step}, {state.samples:,} samples")
    for line in describe_changes(load_config(start.path / CONFIG_FILE), engine.config, changes, state.step):
        log(f"[yellow]  {escape(line)}[/]")
    saved = state.step if start.kind == "resumed" else None
    return Progress(state.step, state.samples, saved), data.continue_from(state.data, state.step)


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
    changes += [(key, _shown(old), _shown(new)) for key, old, new in changed_keys(before, now) if key not in told]
    lines = [f"{key} was {old} up to here and is {new} from here on" for key, old, new in changes]
    rates = learning_rate(before, step + 1), learning_rate(now, step + 1)
    if rates[0] != rates[1]:
        lines.append(
            f"learning rate of step {step + 1:,}: {rates[1]:.3e}, by the config of the checkpoint {rates[0]:.3e}"
        )
    return lines


def _shown(value: Any) -> str:
    return json.dumps(value)
