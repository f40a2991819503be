"""Load the model of a checkpoint for inference, without an engine, a process group or DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import torch

from megachiar.checkpoint.format import CONFIG_FILE, CheckpointState, damaged_checkpoint, read_state
from megachiar.checkpoint.reading import locate_checkpoint, read_weights
from megachiar.config import RunConfig, load_config
from megachiar.model import ChiarFormer, build_model
from megachiar.model.dtypes import DTYPES


def load_for_inference(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[RunConfig, ChiarFormer, CheckpointState]:
    """Verify and load a checkpoint, or the newest whole one of a run folder.

    Args:
        path: run folder or checkpoint folder.
        device: that the model is put on.
        dtype: of the weights; None takes the dtype that the run computed in.

    Returns:
        The config of the run, its model in evaluation mode, and the checkpoint's record.

    Raises:
        UserError: there is no whole checkpoint at ``path``.
    """
    return load_model(locate_checkpoint(path), device, dtype)


def load_model(
    checkpoint: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[RunConfig, ChiarFormer, CheckpointState]:
    """Load what ``load_for_inference`` returns from a checkpoint that ``locate_checkpoint`` has verified.

    Raises:
        UserError: its weights are not those of the model in its config.
    """
    config = load_config(checkpoint / CONFIG_FILE)
    model = build_model(config.model, seed=config.training.seed, document_end=config.document_end, heads=config.heads)
    try:
        model.load_state_dict(read_weights(checkpoint))
    except RuntimeError as error:  # torch lists names and shapes that differ
        raise damaged_checkpoint(checkpoint, f"{CONFIG_FILE} has another model than the weights: {error}") from None
    weight_dtype = dtype or DTYPES[config.precision.compute]
    return config, model.to(device=device, dtype=weight_dtype).eval(), read_state(checkpoint)
