"""What DeepSpeed holds of a run, in and out: master weights, AdamW's moments and the loss scale, under any ZeRO stage.

Optimizers with ZeRO keep shards of flattened parameters. Its own functions (``safe_get_full_...``) put a parameter
together again; what they do not cover, states that do not exist before the first step, is made here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from megachiar.parallel.shard import shard_of
from megachiar.training import deepspeed_patches
from megachiar.training.engine import Engine
from megachiar.training.store import MOMENTS, ShardWriter, Store


def write_state(engine: Engine, folder: Path) -> None:
    """Write this rank's share of parameters, moments and buffers; every rank calls it."""
    writer = ShardWriter(engine.topology)
    _complete_states(engine)
    for name, parameter in _own_parameters(engine):
        shard = shard_of(parameter)
        mine = writer.is_mine(shard)
        for key in (None, *MOMENTS):
            value = _whole(engine, parameter, key)  # ZeRO's ranks gather it together
            if mine:
                writer.add("optimizer" if key else "weights", f"{name}.{key}" if key else name, value, shard)
    for name, buffer in engine.named_buffers():
        if writer.is_mine(None):
            writer.add("weights", name, buffer, None)
    writer.write(folder)


def read_weights_into(engine: Engine, store: Store) -> None:
    """Set weights (master ones and those that compute) and buffers."""
    for name, parameter in engine.named_parameters():
        value = store.part(name, shard_of(parameter), engine.topology.tensor).to(engine.device)
        _set_computing(parameter, value)
        _set(engine, parameter, None, value)
    for name, buffer in engine.named_buffers():
        buffer.copy_(store.whole(name))


def read_optimizer_into(engine: Engine, store: Store, steps: int) -> None:
    """Set AdamW's moments, and ``steps`` as the number of steps it has taken."""
    _complete_states(engine)
    _count_steps(engine, steps)
    for name, parameter in engine.named_parameters():
        for key in MOMENTS:
            value = store.part(f"{name}.{key}", shard_of(parameter), engine.topology.tensor).to(engine.device)
            _set(engine, parameter, key, value)


def _own_parameters(engine: Engine) -> Iterator[tuple[str, nn.Parameter]]:
    """The tied weight is written by the first stage."""
    for name, parameter in engine.named_parameters():
        if not (name.startswith("embedding.") and not engine.topology.is_first_stage):
            yield name, parameter


def _whole(engine: Engine, parameter: nn.Parameter, key: str | None) -> torch.Tensor:
    """fp32 (master) weight, or moment ``key``, of this rank's part of a parameter; all data-parallel ranks call it."""
    if engine.config.parallel.zero_stage == 0:
        return parameter if key is None else engine.deepspeed.optimizer.state[parameter][key]
    if key is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, key)


def _set_computing(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """The weight that computes, in its own type."""
    if deepspeed_patches.is_sharded(parameter):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)
    else:
        with torch.no_grad():
            parameter.copy_(value)


def _set(engine: Engine, parameter: nn.Parameter, key: str | None, value: torch.Tensor) -> None:
    """Master weight or moment ``key`` from this rank's part of the parameter, of which ZeRO keeps a shard."""
    if engine.config.parallel.zero_stage == 0:
        if key is not None:
            engine.deepspeed.optimizer.state[parameter][key].copy_(value)
    elif deepspeed_patches.is_sharded(parameter):
        length, rank = deepspeed_patches.shard_length(parameter), engine.topology.data_rank
        own = value.flatten()[rank * length : (rank + 1) * length]
        own = torch.cat([own, own.new_zeros(length - len(own))])
        if key is None:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def _complete_states(engine: Engine) -> None:
    """Make AdamW's states, which it would make in its first step, and let each parameter find its own."""
    stage = engine.config.parallel.zero_stage
    base = deepspeed_patches.base_optimizer(engine.deepspeed, stage)
    for tensor in deepspeed_patches.stepped_tensors(engine.deepspeed, stage):
        state: dict[str, Any] = base.state[tensor]
        state.setdefault("step", torch.zeros((), device=tensor.device))
        for key in MOMENTS:
            state.setdefault(key, torch.zeros_like(tensor))
    if stage in (1, 2):
        deepspeed_patches.link_optimizer_states(base, (parameter for _, parameter in engine.named_parameters()))


def _count_steps(engine: Engine, steps: int) -> None:
    """Tell AdamW how many steps it has taken."""
    stage = engine.config.parallel.zero_stage
    base = deepspeed_patches.base_optimizer(engine.deepspeed, stage)
    for tensor in deepspeed_patches.stepped_tensors(engine.deepspeed, stage):
        base.state[tensor]["step"] = torch.tensor(float(steps), device=tensor.device)
    for group in base.param_groups:  # apex counts here
        if "step" in group:
            group["step"] = steps
