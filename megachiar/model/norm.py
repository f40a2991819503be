"""LayerNorm, and where it stands in a sub-layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megachiar.parallel.collectives import shared_parameter
from megachiar.topology import TensorGroup


class RowNorm(nn.LayerNorm):
    """LayerNorm of this rank's rows; with sequence parallelism the ranks' gradients of its weights are summed."""

    def __init__(self, size: int, epsilon: float, group: TensorGroup):
        super().__init__(size, eps=epsilon)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = (shared_parameter(p, self.group) for p in (self.weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def residual_norm(x: torch.Tensor, change: torch.Tensor, norm: nn.LayerNorm | None) -> torch.Tensor:
    """``norm(x + change)`` for post-norm layers, ``x + change`` (norm None) for pre-norm ones."""
    return x + change if norm is None else norm(x + change)
