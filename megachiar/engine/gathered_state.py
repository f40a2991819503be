"""The state of a run that DeepSpeed holds, read and set: master weights and the optimizer's moments, under any
ZeRO stage.

Under ZeRO an optimizer keeps shards of flattened parameters. DeepSpeed's documented functions (``safe_get_full_...``)
gather a parameter from its shards. They do not cover the optimizer's state before the first step, which is made here.
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
from megachiar.engine.optimizer import moments_of_stepped
from megachiar.parallel.shard import Shard, shard_of

ReadTensor = Callable[[str, Shard | None], torch.Tensor]
"""Returns this rank's part of the tensor that a checkpoint has under a name, in fp32."""


@dataclass(frozen=True)
class GatheredTensor:
    """This tensor-parallel rank's part of one tensor, gathered from the shards of ZeRO.

    Attributes:
        name: name in the model of the parameter or buffer.
        moment: which of the optimizer's ``MOMENTS`` the value is; None for the fp32 master weight and for a buffer.
        shard: how tensor-parallel ranks cut the parameter; None where each has all of it.
        value: the tensor.
    """

    name: str
    moment: str | None
    shard: Shard | None
    value: torch.Tensor


def gather_state(engine: Engine) -> Iterator[GatheredTensor]:
    """Yield weight and moments of every parameter of this rank's stage, then its buffers, one tensor at a time.

    The ranks of a data-parallel group gather together: each of them must take all tensors. The tied weight comes from
    the first stage alone.
    """
    _initialise_optimizer_state(engine)
    for name, parameter in _parameters_to_save(engine):
        for moment in (None, *engine.replica.moments_of(parameter)):
            value = _gather(engine, parameter, moment)
            yield GatheredTensor(name=name, moment=moment, shard=shard_of(parameter), value=value)
    for name, buffer in engine.named_buffers():
        yield GatheredTensor(name=name, moment=None, shard=None, value=buffer)


def set_weights(engine: Engine, read: ReadTensor, without: tuple[str, ...] = ()) -> None:
    """Set the weights of the model, the master weights and the buffers to what ``read`` returns for their names.

    Weights and buffers whose names begin with one of ``without`` stay as they are.
    """
    for name, parameter in engine.named_parameters():
        if name.startswith(without):
            continue
        value = read(name, shard_of(parameter)).to(engine.device)
        _set_model_weight(parameter, value)
        _set_optimizer_tensor(engine, parameter, None, value)
    for name, buffer in engine.named_buffers():
        if not name.startswith(without):
            buffer.copy_(read(name, None))


def set_moments(engine: Engine, read: ReadTensor, steps: int) -> None:
    """Set the moments to what ``read`` returns for NAME.MOMENT, and the number of steps taken to ``steps``."""
    _initialise_optimizer_state(engine)
    _set_step_count(engine, steps)
    for name, parameter in engine.named_parameters():
        for moment in engine.replica.moments_of(parameter):
            value = read(f"{name}.{moment}", shard_of(parameter)).to(engine.device)
            _set_optimizer_tensor(engine, parameter, moment, value)


def _parameters_to_save(engine: Engine) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that this stage saves: all that it has, but the tied weight on the first stage alone."""
    for name, parameter in engine.named_parameters():
        if engine.topology.is_first_stage or not name.startswith("embedding."):
            yield name, parameter


def _gather(engine: Engine, parameter: nn.Parameter, moment: str | None) -> torch.Tensor:
    """Return the fp32 master weight, or a moment, of this tensor-parallel rank's part of a parameter.

    All data-parallel ranks call it together.
    """
    if engine.config.parallel.zero_stage == 0:
        return parameter if moment is None else engine.deepspeed.optimizer.state[parameter][moment]
    if moment is None:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, moment)


def _set_model_weight(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Set the weight that the model computes with, in its own dtype."""
    if deepspeed_patches.is_sharded(parameter):
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)
    else:
        with torch.no_grad():
            parameter.copy_(value)


def _set_optimizer_tensor(engine: Engine, parameter: nn.Parameter, moment: str | None, value: torch.Tensor) -> None:
    """Set the master weight (``moment`` None) or a moment, of which ZeRO keeps a shard.

    ``value`` is this tensor-parallel rank's part of the parameter. ZeRO 0 has no master weight.
    """
    if engine.config.parallel.zero_stage == 0:
        if moment is not None:
            engine.deepspeed.optimizer.state[parameter][moment].copy_(value)
    elif deepspeed_patches.is_sharded(parameter):
        shard = _zero_3_shard(parameter, value, engine.topology.data_rank)
        if moment is None:
            safe_set_local_fp32_param(parameter, shard)
        else:
            safe_set_local_optimizer_state(parameter, shard, moment)
    elif moment is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def _zero_3_shard(parameter: nn.Parameter, value: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the flat shard of ``value`` that data-parallel ``rank`` holds under ZeRO 3, padded with zeros."""
    length = deepspeed_patches.shard_length(parameter)
    shard = value.flatten()[rank * length : (rank + 1) * length]
    return torch.cat([shard, shard.new_zeros(length - len(shard))])


def _initialise_optimizer_state(engine: Engine) -> None:
    """Make the state that the optimizer makes in its first step, and link each parameter to its part of it."""
    stage = engine.config.parallel.zero_stage
    base = deepspeed_patches.base_optimizer(engine.deepspeed, stage)
    for tensor in deepspeed_patches.stepped_tensors(engine.deepspeed, stage):
        state: dict[str, Any] = base.state[tensor]
        state.setdefault("step", torch.zeros((), device=tensor.device))
        for moment in moments_of_stepped(base, tensor):
            state.setdefault(moment, torch.zeros_like(tensor))
    if stage in (1, 2):
        deepspeed_patches.link_optimizer_states(base, (parameter for _, parameter in engine.named_parameters()))


def _set_step_count(engine: Engine, steps: int) -> None:
    """Set the number of steps that AdamW has taken: torch counts for each tensor, apex for each parameter group."""
    stage = engine.config.parallel.zero_stage
    base = deepspeed_patches.base_optimizer(engine.deepspeed, stage)
    for tensor in deepspeed_patches.stepped_tensors(engine.deepspeed, stage):
        base.state[tensor]["step"] = torch.tensor(float(steps), device=tensor.device)
    for group in base.param_groups:
        if "step" in group:
            group["step"] = steps
