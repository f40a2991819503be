"""LayerNorm of a rank's rows, before or after the residual addition.

Shapes: n = rows, d = channels.
"""

from __future__ import annotations

import torch
from torch import nn

from megachiar.kernels.norm import add_and_norm
from megachiar.kernels.spectral import mix_add_and_norm
from megachiar.parallel.collectives import replicated_parameter
from megachiar.topology import TensorParallelGroup


class _ReplicatedNorm(nn.Module):
    """Weight and bias (d,) of a LayerNorm that each rank applies to its own rows."""

    def __init__(self, size: int, epsilon: float, group: TensorParallelGroup):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = epsilon
        self.group = group

    def replicated_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias (d,), whose gradients are summed over ranks that hold different rows."""
        return replicated_parameter(self.weight, self.group), replicated_parameter(self.bias, self.group)


class RowNorm(_ReplicatedNorm):
    """LayerNorm of this rank's rows, after the output of a branch is added, if there is one."""

    def forward(self, x: torch.Tensor, branch_output: torch.Tensor | None = None) -> torch.Tensor:
        """Normalise ``x + branch_output`` (n, d), or ``x`` alone if there is no branch."""
        return add_and_norm(x, branch_output, *self.replicated_parameters(), self.eps)


class MixNorm(_ReplicatedNorm):
    """LayerNorm of this rank's rows, after their DCT mixing is added."""

    def forward(
        self, x: torch.Tensor, filters: torch.Tensor, gain: float, spectrum: torch.Tensor | None
    ) -> torch.Tensor:
        """Normalise ``x + spectral_mix(x, filters, gain, spectrum)`` (n, d)."""
        return mix_add_and_norm(x, filters, gain, spectrum, *self.replicated_parameters(), self.eps)


def residual_norm(x: torch.Tensor, branch_output: torch.Tensor, norm: RowNorm | None) -> torch.Tensor:
    """Return ``norm(x + branch_output)`` for post-norm layers; ``x + branch_output`` for pre-norm ones (norm None)."""
    return x + branch_output if norm is None else norm(x, branch_output)
