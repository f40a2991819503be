"""Load the model of a checkpoint to read it: no engine, no process group, no DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import torch

from megachiar.checkpoint.format import CONFIG_FILE, CheckpointState, locate_checkpoint, read_state, read_weights
from megachiar.config import RunConfig, load_config
from megachiar.model import ChiarFormer, build_model
from megachiar.model.dtypes import DTYPES


def load_for_inference(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[RunConfig, ChiarFormer, CheckpointState]:
    """Config, model (in evaluation mode) and record of a checkpoint or of a run folder's newest one.

    Args:
        path: run folder or checkpoint folder.
        device: where the model goes.
        dtype: of its weights; by default the type the run computed in.
    """
    checkpoint = locate_checkpoint(path)
    config = load_config(checkpoint / CONFIG_FILE)
    model = build_model(config.model, seed=config.training.seed, document_end=config.document_end)
    model.load_state_dict(read_weights(checkpoint))
    weight_dtype = dtype or DTYPES[config.precision.compute]
    return config, model.to(device=device, dtype=weight_dtype).eval(), read_state(checkpoint)
