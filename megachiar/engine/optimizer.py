"""AdamW with decoupled weight decay, from whichever library is there."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megachiar.config.sections import OptimizerConfig
from megachiar.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means, by their names in torch's optimizer state and in our checkpoints."""


@dataclass(frozen=True)
class BuiltOptimizer:
    """An optimizer and where it comes from, for the first lines of the log."""

    optimizer: torch.optim.Optimizer
    implementation: str


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> BuiltOptimizer:
    """AdamW over ``model``'s parameters in two groups: matrices decay; biases, norms and DCT filters do not.

    Raises:
        UserError: ``implementation: apex`` without NVIDIA's apex or a GPU.
    """
    settings = {"lr": config.learning_rate, "betas": config.betas, "eps": config.epsilon}
    groups = parameter_groups(model, config.weight_decay)
    on_gpu = torch.cuda.is_available()
    apex = apex_fused_adam() if config.implementation != "torch" and on_gpu else None
    if config.implementation == "apex" and apex is None:
        raise UserError(
            "optimizer.implementation",
            "is apex, but NVIDIA's apex with its CUDA extensions is not installed or there is no GPU",
            "build apex from NVIDIA's source with --cuda_ext (the `apex` on the package index is another project), "
            "or use auto",
        )
    if apex is not None:
        return BuiltOptimizer(apex(groups, adam_w_mode=True, **settings), "NVIDIA apex FusedAdam")
    return BuiltOptimizer(torch.optim.AdamW(groups, fused=True, **settings), "torch AdamW, fused")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with two or more dimensions decay; vectors (biases, norms, DCT filters, gates) do not."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    keep = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def apex_fused_adam() -> type[torch.optim.Optimizer] | None:
    """NVIDIA apex's FusedAdam; None without it. ``amp_C`` is its compiled part: the PyPI ``apex`` has none."""
    if importlib.util.find_spec("amp_C") is None or importlib.util.find_spec("apex") is None:
        return None
    from apex.optimizers import FusedAdam

    return FusedAdam
