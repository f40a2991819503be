"""Load a checkpoint into an engine: everything to resume a run, or the weights alone to start a new one."""

from __future__ import annotations

from pathlib import Path

from megachiar.checkpoint.format import CheckpointState
from megachiar.checkpoint.sharded_tensors import ShardReader
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
    read = ShardReader(checkpoint).for_rank(engine.topology.tensor)
    set_weights(engine, read)
    set_moments(engine, read, state.optimizer_steps)
    engine.skipped_steps = state.step - state.optimizer_steps
    if state.loss_scale is not None:
        set_loss_scale_state(engine.deepspeed, state.loss_scale)


def load_weights(engine: Engine, checkpoint: Path) -> None:
    """Load the weights alone into ``engine``, for a new run; every rank calls this function.

    ``read_compatible`` has found the checkpoint to hold the engine's model.
    """
    set_weights(engine, ShardReader(checkpoint).for_rank(engine.topology.tensor))
