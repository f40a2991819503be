"""Start DeepSpeed's engine with the typed config and its raw keys, and turn what it refuses into one message."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from pydantic import ValidationError
from torch import nn

from megachiar.config import RunConfig
from megachiar.config.deepspeed import to_deepspeed
from megachiar.topology import LaunchError


def initialize(config: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer, mpu: Any = None) -> Any:
    """Return DeepSpeed's engine around ``model``; every rank calls this function.

    Args:
        config: of the run.
        model: this rank's part of the model.
        optimizer: of the parameters of ``model``.
        mpu: says which ranks share a matrix; None where none do.

    Raises:
        LaunchError: DeepSpeed does not know a raw key of the config, or refuses its value.
    """
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=to_deepspeed(config), mpu=mpu, dist_init_required=False
        )
    except (ValidationError, deepspeed.DeepSpeedConfigError) as error:
        if not config.deepspeed:  # a defect of ours
            raise
        problem = f"DeepSpeed refuses a raw key: {_reason(error)}"
        raise LaunchError("deepspeed", problem, "correct or remove the key") from error
    return engine


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors())
    return str(error)
