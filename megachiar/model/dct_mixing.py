"""The DCT mixing sub-layer: a learned filter over the spectrum of one token's channels. No token sees another here.

Shapes: n = rows that are routed to DCT mixing, d = channels, P = numbers of a packed spectrum (see ``kernels.dct``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.norm import add_and_norm
from megachiar.kernels.spectral import spectral_mix
from megachiar.model.norm import MixNorm, RowNorm, residual_norm
from megachiar.parallel.collectives import replicated_parameter
from megachiar.topology import TensorParallelGroup


class DctMixing(nn.Module):
    """The sub-layer ``LN_dct(x + C^T diag(w) C x)`` (norm: post) or ``x + C^T diag(w) C LN_dct(x)`` (norm: pre).

    Each rank mixes the rows that it has: with sequence parallelism nothing is communicated.
    """

    def __init__(self, config: ModelConfig, group: TensorParallelGroup):
        super().__init__()
        self.pre = config.norm == "pre"
        self.gain = config.dct.gain
        self.group = group
        self.filter = nn.Parameter(torch.ones(config.hidden_size))
        self.norm = (RowNorm if self.pre else MixNorm)(config.hidden_size, config.norm_epsilon, group)

    def forward(
        self, routed: torch.Tensor, spectrum: torch.Tensor | None = None, matrix: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute the sub-layer for the routed rows.

        Args:
            routed: rows (n, d) that are routed to DCT mixing.
            spectrum: their packed DCT (n, P) without gradient, where the router has computed it; else None.
            matrix: (d, d), the filter as a matrix, where it is made for all layers at once; else None.

        Returns:
            The sub-layer's result (n, d), residual and norm included.
        """
        if matrix is not None:
            mixed = F.linear(self.norm(routed) if self.pre else routed, matrix)
            if self.pre:
                return residual_norm(routed, mixed, None)
            return add_and_norm(routed, mixed, *self.norm.replicated_parameters(), self.norm.eps)
        weight = replicated_parameter(self.filter, self.group)
        if self.pre:
            return residual_norm(routed, spectral_mix(self.norm(routed), weight, self.gain), None)
        return self.norm(routed, weight, self.gain, spectrum)
