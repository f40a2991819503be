"""DCT mixing sub-layer: a learned filter over the channels' spectrum of one token. No token sees another here."""

from __future__ import annotations

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.spectral import spectral_mix
from megachiar.model.norm import residual_norm


class DctMixing(nn.Module):
    """``LN_dct(x + C^T diag(w) C x)`` (norm: post) or ``x + C^T diag(w) C LN_dct(x)`` (norm: pre)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pre, self.gain = config.norm == "pre", config.dct.gain
        self.filter = nn.Parameter(torch.ones(config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)

    def forward(self, chosen: torch.Tensor, spectrum: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            chosen: rows (n, d) that take this operator.
            spectrum: their DCT (n, d) without gradient, where the router has computed it.

        Returns:
            (n, d), residual and norm included.
        """
        if self.pre:
            return residual_norm(chosen, spectral_mix(self.norm(chosen), self.filter, self.gain), None)
        return residual_norm(chosen, spectral_mix(chosen, self.filter, self.gain, spectrum), self.norm)
