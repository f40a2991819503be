"""The feed-forward sub-layer, which all operators of a layer share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.dropout import apply_dropout
from megachiar.model.batch_layout import DropoutKeys, dropout_of
from megachiar.model.norm import RowNorm, residual_norm
from megachiar.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megachiar.topology import TensorParallelGroup


class FeedForward(nn.Module):
    """The sub-layer ``LN_ff(y + W2 gelu(W1 y))`` (norm: post) or ``y + W2 gelu(W1 LN_ff(y))`` (norm: pre)."""

    def __init__(self, config: ModelConfig, layer: int, group: TensorParallelGroup):
        super().__init__()
        self.pre = config.norm == "pre"
        self.dropout = config.dropout
        self.layer = layer
        self.up = ColumnParallelLinear(config.hidden_size, config.ffn_size, group)
        self.down = RowParallelLinear(config.ffn_size, config.hidden_size, group)
        self.first_feature = group.rank * (config.ffn_size // group.size)
        self.norm = RowNorm(config.hidden_size, config.norm_epsilon, group)

    def forward(self, y: torch.Tensor, keys: DropoutKeys | None) -> torch.Tensor:
        """Compute the sub-layer for this rank's rows (m, d); ``keys`` are those of their dropout, None for none."""
        inner = inner_dropout = outer_dropout = None
        if self.training and self.dropout and keys is not None:
            inner_dropout = dropout_of(self.dropout, keys.all_rows, self.layer, 2)
            outer_dropout = dropout_of(self.dropout, keys.local_rows, self.layer, 3)
        inner = apply_dropout(F.gelu(self.up(self.norm(y) if self.pre else y)), inner_dropout, self.first_feature)
        branch_output = apply_dropout(self.down(inner), outer_dropout)
        return residual_norm(y, branch_output, None if self.pre else self.norm)
