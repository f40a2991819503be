"""RBF mixing sub-layer, the paper's ablation: similarity in a space of random Fourier features.

``phi(x) = [cos(x W), sin(x W)] `` with W drawn once; a token takes the softmax-weighted mean of ``phi`` over itself and
the tokens before it (the published code looks at later ones too), and a linear map back to d channels.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.attention import routed_attention
from megachiar.model.cache import LayerCache
from megachiar.model.grid import Grid
from megachiar.model.norm import residual_norm


class RbfMixing(nn.Module):
    """``LN_rbf(x + W_o softmax(phi phi^T) phi)`` (norm: post), or with LN_rbf before (norm: pre)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, features = config.hidden_size, config.rbf.features
        self.pre, self.dropout = config.norm == "pre", config.dropout
        self.spread = math.sqrt(2 * config.rbf.gamma)
        self.register_buffer("frequencies", torch.zeros(d, features))  # drawn by init.py like a weight, never trained
        self.output = nn.Linear(2 * features, d)
        self.norm = nn.LayerNorm(d, eps=config.norm_epsilon)

    def forward(
        self, x: torch.Tensor, chosen: torch.Tensor, rows: torch.Tensor, grid: Grid, cache: LayerCache | None
    ) -> torch.Tensor:
        """As ``SelfAttention.forward``; ``rows`` are always given."""
        phi = self._features(self.norm(x) if self.pre else x)  # (N, 2R)
        keys = phi.view(grid.sequences, 1, grid.length, -1)
        values = keys
        if cache is not None:
            keys, values = cache.extend(keys, values)
        dropout = self.dropout if self.training else 0.0
        queries = phi.index_select(0, rows)[:, None]
        mixed = routed_attention(queries, keys, values, rows, grid.length, dropout, scale=1.0)
        return residual_norm(chosen, self.output(mixed.squeeze(1)), None if self.pre else self.norm)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        angle = x @ self.frequencies / math.sqrt(self.frequencies.shape[1])
        return torch.cat([angle.cos(), angle.sin()], -1)
