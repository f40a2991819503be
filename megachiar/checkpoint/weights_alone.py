"""Write a checkpoint of weights that no engine trained: without optimizer state, by one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megachiar.checkpoint.save import write_checkpoint
from megachiar.checkpoint.sharded_tensors import ShardWriter
from megachiar.checkpoint.snapshot import Snapshot
from megachiar.config import RunConfig
from megachiar.data.sampling.history import DataHistory
from megachiar.topology import Topology

ALONE = Topology(rank=0, world_size=1, local_rank=0, data_rank=0, data_size=1)


def write_weights(
    config: RunConfig,
    weights: Mapping[str, torch.Tensor],
    *,
    step: int,
    data: DataHistory,
    origin: str,
    validation: Mapping[str, float],
) -> Path:
    """Write a checkpoint of ``weights`` into the run folder of ``config``, which a run of any layout can load.

    Args:
        config: of the run.
        weights: every parameter of the model, whole, by name.
        step: optimizer steps that the weights were trained for.
        data: what they were trained on, as far as that is known.
        origin: where they come from, in place of the layout of a run that trained them.
        validation: loss in nats a token on validation sets, by name.

    Returns:
        The folder of the checkpoint.

    Raises:
        SaveError: the disk is full or refuses to be written.
    """
    shards = ShardWriter(ALONE)
    for name, tensor in weights.items():
        shards.add(name, None, tensor, None)
    fields: dict[str, Any] = {
        "step": step,
        "samples": data.samples_before(step),
        "data": data,
        "optimizer_steps": step,
        "loss_scale": None,
        "layout": origin,
        "validation": dict(validation),
    }
    return write_checkpoint(Snapshot(step, config, fields, shards), lambda value: [value], is_main=True)
