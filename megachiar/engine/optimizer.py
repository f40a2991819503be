"""AdamW with decoupled weight decay: NVIDIA apex's where it is installed, else torch's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import nn

from megachiar.config.sections import OptimizerConfig
from megachiar.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's running means of the gradient and of its square, in torch's optimizer state and in checkpoints."""


class AdamSettings(TypedDict):
    """Keyword arguments that torch's AdamW and apex's FusedAdam share."""

    lr: float
    betas: tuple[float, float]
    eps: float


@dataclass(frozen=True)
class BuiltOptimizer:
    """An optimizer and the name of its implementation, which the head of the log shows."""

    optimizer: torch.optim.Optimizer
    implementation: str


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> BuiltOptimizer:
    """Return AdamW over the parameters of ``model``, in the groups of ``parameter_groups``.

    Raises:
        UserError: ``optimizer.implementation`` is apex, but NVIDIA's apex or a GPU is missing.
    """
    settings: AdamSettings = {"lr": config.learning_rate, "betas": config.betas, "eps": config.epsilon}
    groups = parameter_groups(model, config.weight_decay, config.decay_all)
    may_use_apex = config.implementation != "torch" and torch.cuda.is_available()
    fused_adam = apex_fused_adam() if may_use_apex else None
    if config.implementation == "apex" and fused_adam is None:
        raise UserError(
            "optimizer.implementation",
            "is apex, but NVIDIA's apex with its CUDA extensions is not installed or there is no GPU",
            "build apex from NVIDIA's source with --cuda_ext (the `apex` on the package index is another project), "
            "or use auto",
        )
    if fused_adam is not None:
        return BuiltOptimizer(fused_adam(groups, adam_w_mode=True, **settings), "NVIDIA apex FusedAdam")
    return BuiltOptimizer(torch.optim.AdamW(groups, fused=True, **settings), "torch AdamW, fused")


def parameter_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """Return the trained parameters as torch's parameter groups, without empty groups.

    Parameters with two or more dimensions decay. Vectors (biases, norms, DCT filters, gates) do so with ``decay_all``.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if decay_all or p.ndim >= 2]
    not_decayed = [p for p in trained if not decay_all and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": not_decayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def apex_fused_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """Return the class FusedAdam of NVIDIA's apex; None without it.

    ``amp_C`` is apex's compiled part. The package that PyPI calls ``apex`` is another project and has none.
    """
    if importlib.util.find_spec("amp_C") is None or importlib.util.find_spec("apex") is None:
        return None
    from apex.optimizers import FusedAdam

    return FusedAdam
