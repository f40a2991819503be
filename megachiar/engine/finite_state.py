"""Check that every weight and moment of a run is a finite number, without gathering them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megachiar.engine import deepspeed_patches
from megachiar.engine.engine import Engine
from megachiar.engine.gathered_state import gather_state
from megachiar.engine.optimizer import MOMENTS


def find_non_finite(engine: Engine) -> str | None:
    """Return the name of a weight or moment that is not finite on any rank; None if all are.

    Each rank reads the shard that its optimizer updates, once. Tensors are gathered only to find the name, where a
    number is not finite. Every rank calls this function, and all get the same answer.
    """
    stage = engine.config.parallel.zero_stage
    state = deepspeed_patches.base_optimizer(engine.deepspeed, stage).state
    weights = deepspeed_patches.stepped_tensors(engine.deepspeed, stage)
    moments = [state[tensor][name] for tensor in weights for name in MOMENTS if name in state.get(tensor, {})]
    bad = not _all_finite([*weights, *moments])
    return _find_name(engine) if engine.sum_over_world([float(bad)])[0] else None


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    """Return whether all numbers are finite; the device is asked once unless a sum is too large for its type."""
    sums = torch.stack([tensor.detach().sum() for tensor in tensors])
    return bool(sums.isfinite().all()) or all(bool(tensor.isfinite().all()) for tensor in tensors)


def _find_name(engine: Engine) -> str:
    found = None
    for tensor in gather_state(engine):  # to its end: the ranks gather together
        if found is None and not tensor.value.isfinite().all():
            found = tensor.name if tensor.moment is None else f"{tensor.name}.{tensor.moment}"
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, found)
    return next((name for name in names if name is not None), "a weight")
