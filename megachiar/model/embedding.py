"""The token embedding and the head that is tied to it: one weight, one module, so that sharding gathers it as one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.cross_entropy import CrossEntropy, linear_cross_entropy


class TiedEmbedding(nn.Module):
    """Embedding (V, d) of tokens, and logits or loss of hidden rows with the same weight."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor | CrossEntropy:
        """Integer tokens (...) to rows (..., d); floating rows (N, d) to logits (N, V), or with targets to losses."""
        if not x.is_floating_point():
            return F.embedding(x, self.weight)
        if targets is None:
            return F.linear(x, self.weight)
        return linear_cross_entropy(x, self.weight, targets)
