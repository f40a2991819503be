"""What DeepSpeed holds of a run, in and out: master weights and AdamW's moments, under any ZeRO stage.

Optimizers with ZeRO keep shards of flattened parameters. DeepSpeed's own functions (``safe_get_full_...``) put a
parameter together again. What they do not cover, states that do not exist before the first step, is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

from megachiar.engine import deepspeed_patches
from megachiar.engine.engine import Engine
from megachiar.engine.optimizer import MOMENTS
from megachiar.parallel.shard import Shard, shard_of

ReadTensor = Callable[[str, Shard | None], torch.Tensor]
"""Returns this rank's part of the tensor that a checkpoint has under a name, fp32."""


@dataclass(frozen=True)
class GatheredTensor:
    """This tensor-parallel rank's part of one tensor, put together over the ranks of ZeRO.

    Attributes:
        name: of the parameter or buffer in the model.
        moment: which of ``MOMENTS`` this is; None for the fp32 master weight and for a buffer's value.
        shard: how tensor-parallel ranks cut the parameter; None where each has all of it.
        value: the tensor.
    """

    name: str
    moment: str | None
    shard: Shard | None
    value: torch.Tensor


def gather_state(engine: Engine) -> Iterator[GatheredTensor]:
    """Yield weight and moments of every parameter of this rank's stage, then its buffers, one tensor at a time.

    All ranks of a data-parallel group gather together: each must take all tensors. The tied weight comes from the
    first stage alone.
    """
    _complete_states(engine)
    for name, parameter in _own_parameters(engine):
        for moment in (None, *MOMENTS):
            yield GatheredTensor(name, moment, shard_of(parameter), _whole(engine, parameter, moment))
    for name, buffer in engine.named_buffers():
        yield GatheredTensor(name, None, None, buffer)


def set_weights(engine: Engine, read: ReadTensor) -> None:
    """Set weights (master weights and those that compute) and buffers to what ``read`` returns."""
    for name, parameter in engine.named_parameters():
        value = read(name, shard_of(parameter)).to(engine.device)
        _set_computing(parameter, value)
        _set(engine, parameter, None, value)
    for name, buffer in engine.named_buffers():
        buffer.copy_(read(name, None))


def set_moments(engine: Engine, read: ReadTensor, steps: int) -> None:
    """Set AdamW's moments to what ``read`` returns for NAME.MOMENT, and ``steps`` as the steps that it has taken."""
    _complete_states(engine)
    _count_steps(engine, steps)
    for name, parameter in engine.named_parameters():
        for key in MOMENTS:
            _set(engine, parameter, key, read(f"{name}.{key}", shard_of(parameter)).to(engine.device))


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
