"""Load a verified checkpoint into an engine: everything to resume a run, or the weights alone to start a new one."""

from __future__ import annotations

from pathlib import Path

from megachiar.checkpoint.compatibility import check_same_model
from megachiar.checkpoint.format import CONFIG_FILE, CheckpointState, read_state
from megachiar.checkpoint.reading import open_tensors
from megachiar.config import load_config
from megachiar.engine.deepspeed_patches import set_loss_scale_state
from megachiar.engine.engine import Engine
from megachiar.engine.gathered_state import set_moments, set_weights


def resume(engine: Engine, checkpoint: Path) -> CheckpointState:
    """Load weights, optimizer state and loss scale into ``engine``; every rank calls this function.

    Returns:
        The checkpoint's record, which holds the step and the position in the data to continue from.

    Raises:
        UserError: the checkpoint is damaged or holds another model.
    """
    state = read_state(checkpoint)
    saved = load_config(checkpoint / CONFIG_FILE)
    check_same_model(checkpoint, saved.model, engine.config.model)
    read = open_tensors(checkpoint).for_rank(engine.topology.tensor)
    set_weights(engine, read)
    set_moments(engine, read, state.optimizer_steps)
    engine.skipped_steps = state.step - state.optimizer_steps
    if state.loss_scale is not None:
        set_loss_scale_state(engine.deepspeed, state.loss_scale)
    return state


def load_weights(engine: Engine, checkpoint: Path) -> None:
    """Load the weights alone into ``engine``, for a new run; every rank calls this function.

    Raises:
        UserError: the checkpoint is damaged or holds another model.
    """
    check_same_model(checkpoint, load_config(checkpoint / CONFIG_FILE).model, engine.config.model)
    set_weights(engine, open_tensors(checkpoint).for_rank(engine.topology.tensor))
