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
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from megachiar.parallel.shard import shard_of
from megachiar.training.engine import Engine
from megachiar.training.store import MOMENTS, ShardWriter, Store

_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


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


def loss_scale_state(engine: Engine) -> dict[str, float] | None:
    """The dynamic loss scale of fp16 and where it is in its window; None without one."""
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    if not engine.deepspeed.fp16_enabled() or scaler is None or not getattr(scaler, "dynamic", False):
        return None
    return {key: getattr(scaler, key) for key in _SCALER_KEYS}


def set_loss_scale_state(engine: Engine, state: dict[str, float]) -> None:
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    if engine.deepspeed.fp16_enabled() and getattr(scaler, "dynamic", False):
        for key in _SCALER_KEYS:
            setattr(scaler, key, state[key] if key == "cur_scale" else int(state[key]))


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
    if hasattr(parameter, "ds_id"):  # ZeRO 3 holds a shard of it
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
    elif hasattr(parameter, "ds_id"):
        length, rank = parameter.ds_tensor.numel(), engine.topology.data_rank
        own = value.flatten()[rank * length : (rank + 1) * length]
        own = torch.cat([own, own.new_zeros(length - len(own))])
        if key is None:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, key)
    elif parameter._hp_mapping is not None:
        parameter.set_full_hp_param(value, key)


def _complete_states(engine: Engine) -> None:
    """Make AdamW's states, which it would make in its first step, and let each parameter find its own.

    DeepSpeed links them once, after the first group's first step, and misses those of other groups.
    """
    base, stage = _adamw(engine), engine.config.parallel.zero_stage
    for tensor in _flat_tensors(engine):
        state: dict[str, Any] = base.state[tensor]
        state.setdefault("step", torch.zeros((), device=tensor.device))
        for key in MOMENTS:
            state.setdefault(key, torch.zeros_like(tensor))
    if stage in (1, 2):
        for _, parameter in engine.named_parameters():
            mapping = parameter._hp_mapping
            if mapping is not None:
                flat = base.param_groups[mapping.param_group_index]["params"][0]
                mapping.set_optim_state_fragment(flat, base.state[flat])


def _count_steps(engine: Engine, steps: int) -> None:
    """Tell AdamW how many steps it has taken."""
    base = _adamw(engine)
    for tensor in _flat_tensors(engine):
        base.state[tensor]["step"] = torch.tensor(float(steps), device=tensor.device)
    for group in base.param_groups:  # apex counts here
        if "step" in group:
            group["step"] = steps


def _adamw(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer within DeepSpeed's."""
    optimizer = engine.deepspeed.optimizer
    return optimizer if engine.config.parallel.zero_stage == 0 else optimizer.optimizer


def _flat_tensors(engine: Engine) -> list[torch.Tensor]:
    """What AdamW steps: this rank's shards of flattened parameters, or with ZeRO 0 the parameters."""
    if engine.config.parallel.zero_stage == 3:
        return engine.deepspeed.optimizer.fp32_partitioned_groups_flat
    return [tensor for group in _adamw(engine).param_groups for tensor in group["params"]]
