"""Feed-forward sub-layer, shared by all operators of a layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.model.norm import residual_norm


class FeedForward(nn.Module):
    """``LN_ff(y + W2 gelu(W1 y))`` (norm: post) or ``y + W2 gelu(W1 LN_ff(y))`` (norm: pre)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pre, self.dropout = config.norm == "pre", config.dropout
        self.up = nn.Linear(config.hidden_size, config.ffn_size)
        self.down = nn.Linear(config.ffn_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """Rows (n, d) to rows (n, d)."""
        hidden = F.dropout(F.gelu(self.up(self.norm(y) if self.pre else y)), self.dropout, self.training)
        change = F.dropout(self.down(hidden), self.dropout, self.training)
        return residual_norm(y, change, None if self.pre else self.norm)
