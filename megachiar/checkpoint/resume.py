"""Load a verified checkpoint into an engine: everything to resume a run, or the weights alone to start a new one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from megachiar.checkpoint.format import CONFIG_FILE, CheckpointState, read_state
from megachiar.checkpoint.reading import open_tensors
from megachiar.config import load_config
from megachiar.engine.deepspeed_patches import set_loss_scale_state
from megachiar.engine.engine import Engine
from megachiar.engine.gathered_state import set_moments, set_weights


def resume(engine: Engine, checkpoint: Path, state: CheckpointState) -> None:
    """Load weights, optimizer state and loss scale into ``engine``; every rank calls this function.

    Args:
        engine: of a model that ``read_compatible`` has found to be the checkpoint's.
        checkpoint: to load.
        state: its record.
    """
    read = open_tensors(checkpoint).for_rank(engine.topology.tensor)
    set_weights(engine, read)
    set_moments(engine, read, state.optimizer_steps)
    engine.skipped_steps = state.step - state.optimizer_steps
    if state.loss_scale is not None:
        set_loss_scale_state(engine.deepspeed, state.loss_scale)


def load_weights(
    engine: Engine, checkpoint: Path, classes: Mapping[str, tuple[str, ...] | None] | None = None
) -> list[str]:
    """Load the weights alone into ``engine``, for a new run or a test; every rank calls this function.

    ``read_compatible`` has found the checkpoint to hold the engine's model. Its classification heads may be others:
    heads of the run that it does not have, or has for other classes, keep their initial weights. A new run that anneals
    its routers begins at attention for all tokens, whatever threshold the checkpoint has; and a running threshold that
    the checkpoint does not have starts as in any new run.

    Args:
        engine: of the new run.
        checkpoint: to load.
        classes: names of the classes of each of the new run's heads, in their order; None for a test of the run that
            wrote the checkpoint.

    Returns:
        The names of these heads.
    """
    reader = open_tensors(checkpoint)
    saved, state = load_config(checkpoint / CONFIG_FILE).heads, read_state(checkpoint)
    new = [
        name
        for name, head in engine.config.heads.items()
        if (then := saved.get(name)) is None
        or (then.classes, then.kind) != (head.classes, head.kind)
        or _differ(state.classes_of(name), (classes or {}).get(name))
    ]
    without = [f"classifiers.{name}." for name in new]
    if classes is not None:
        without += _starts_anew(engine, reader.names())
    set_weights(engine, reader.for_rank(engine.topology.tensor), without=tuple(without))
    return new


def _starts_anew(engine: Engine, saved: Collection[str]) -> list[str]:
    """Return the running numbers of routers that a new run starts anew; ``saved`` are the names in its checkpoint."""
    running = [name for name, _ in engine.named_buffers() if ".router." in name]
    if engine.config.model.router.anneal_steps:
        return [name for name in running if name.endswith((".annealed_steps.value", ".running_threshold.value"))]
    return [name for name in running if name not in saved]


def _differ(then: tuple[str, ...] | None, now: tuple[str, ...] | None) -> bool:
    """Return whether names of classes are known to differ."""
    return then is not None and now is not None and then != now
