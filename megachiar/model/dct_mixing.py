"""DCT mixing sub-layer: a learned filter over the channels' spectrum of one token. No token sees another here."""

from __future__ import annotations

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.spectral import spectral_mix
from megachiar.model.norm import MixNorm, RowNorm, residual_norm
from megachiar.parallel.collectives import replicated_parameter
from megachiar.topology import TensorParallelGroup


class DctMixing(nn.Module):
    """``LN_dct(x + C^T diag(w) C x)`` (norm: post) or ``x + C^T diag(w) C LN_dct(x)`` (norm: pre).

    It works on the rows that a rank has: with sequence parallelism it communicates nothing.
    """

    def __init__(self, config: ModelConfig, group: TensorParallelGroup):
        super().__init__()
        self.pre, self.gain, self.group = config.norm == "pre", config.dct.gain, group
        self.filter = nn.Parameter(torch.ones(config.hidden_size))
        self.norm = (RowNorm if self.pre else MixNorm)(config.hidden_size, config.norm_epsilon, group)

    def forward(self, routed: torch.Tensor, spectrum: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            routed: rows (n, d) that take this operator.
            spectrum: their packed DCT (n, P) without gradient, where the router has computed it.

        Returns:
            (n, d), residual and norm included.
        """
        weight = replicated_parameter(self.filter, self.group)
        if self.pre:
            return residual_norm(routed, spectral_mix(self.norm(routed), weight, self.gain), None)
        return self.norm(routed, weight, self.gain, spectrum)
