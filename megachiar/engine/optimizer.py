"""The optimizer of a run: AdamW for every parameter, or Muon for the matrices between hidden states.

AdamW is NVIDIA apex's where it is installed, else torch's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import nn

from megachiar.config.sections import OptimizerConfig
from megachiar.engine.matrix_parts import place_matrices
from megachiar.engine.muon import MATRICES, MOMENTUM, MuonAdamW
from megachiar.errors import UserError
from megachiar.model.hidden_matrices import HiddenMatrix, hidden_matrices
from megachiar.topology import Topology

_ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
_MUON_MOMENTS = (MOMENTUM,)
MOMENTS = (*_ADAM_MOMENTS, *_MUON_MOMENTS)
"""Names of running means in torch's optimizer state and in checkpoints: AdamW's of the gradient and of its square, and
Muon's of the gradient."""


class AdamSettings(TypedDict):
    """Keyword arguments that torch's AdamW and apex's FusedAdam share."""

    lr: float
    betas: tuple[float, float]
    eps: float


@dataclass(frozen=True)
class BuiltOptimizer:
    """An optimizer, the name of its implementation, which the head of the log shows, and the matrices that Muon has."""

    optimizer: torch.optim.Optimizer
    implementation: str
    matrices: list[HiddenMatrix]

    def moments_of(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """Return which of ``MOMENTS`` the optimizer keeps of a parameter."""
        is_matrix = any(parameter is matrix.parameter for matrix in self.matrices)
        return _MUON_MOMENTS if is_matrix else _ADAM_MOMENTS

    def place(self, zero_stage: int, topology: Topology) -> None:
        """Tell Muon where its matrices are, once DeepSpeed has laid them out; every rank calls this method."""
        if isinstance(self.optimizer, MuonAdamW):
            self.optimizer.place(place_matrices(self.matrices, self.optimizer, zero_stage, topology))


def moments_of_stepped(optimizer: torch.optim.Optimizer, tensor: torch.Tensor) -> tuple[str, ...]:
    """Return which of ``MOMENTS`` the optimizer keeps of a tensor that it steps."""
    of_matrices = (group for group in optimizer.param_groups if group.get(MATRICES))
    is_matrix = any(tensor is stepped for group in of_matrices for stepped in group["params"])
    return _MUON_MOMENTS if is_matrix else _ADAM_MOMENTS


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> BuiltOptimizer:
    """Return the optimizer of the parameters of ``model``, in the groups of ``parameter_groups``.

    Raises:
        UserError: ``optimizer.implementation`` is apex, but NVIDIA's apex or a GPU is missing.
    """
    matrices = hidden_matrices(model) if config.kind == "muon" else []
    of_muon = {matrix.parameter for matrix in matrices}
    others = [p for p in model.parameters() if p.requires_grad and p not in of_muon]
    groups = parameter_groups(others, config.weight_decay, config.decay_all)
    adamw, implementation = _build_adamw(groups, config) if groups else (None, "")
    if config.kind == "adamw":
        assert adamw is not None
        return BuiltOptimizer(adamw, implementation, matrices)
    group = {"params": [matrix.parameter for matrix in matrices], "weight_decay": config.weight_decay}
    muon = MuonAdamW(group, adamw, config.learning_rate, config.muon)
    return BuiltOptimizer(muon, f"Muon in {config.muon.ns_dtype}; {implementation}".removesuffix("; "), matrices)


def _build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> tuple[torch.optim.Optimizer, str]:
    """Return AdamW over parameter groups, and the name of its implementation; errors as in ``build_optimizer``."""
    settings: AdamSettings = {"lr": config.learning_rate, "betas": config.betas, "eps": config.epsilon}
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
        return fused_adam(groups, adam_w_mode=True, **settings), "NVIDIA apex FusedAdam"
    return torch.optim.AdamW(groups, fused=True, **settings), "torch AdamW, fused"


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """Return parameters as torch's parameter groups, without empty groups.

    Parameters with two or more dimensions decay. Vectors (biases, norms, DCT filters, gates) do so with ``decay_all``.
    """
    trained = list(parameters)
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
