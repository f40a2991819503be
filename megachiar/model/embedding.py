"""The token embedding and the head that is tied to it: one weight, one module, so that sharding gathers it as one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.cross_entropy import CrossEntropy, linear_cross_entropy
from megachiar.kernels.dropout import apply_dropout
from megachiar.model.batch_layout import BatchLayout, dropout_of
from megachiar.parallel.collectives import all_gather, gather_or_copy_input, reduce_or_scatter_output
from megachiar.parallel.loss import VocabularyShard
from megachiar.parallel.shard import Shard, sharded
from megachiar.topology import TensorParallelGroup


class TiedEmbedding(nn.Module):
    """Embedding (V, d) of tokens, and logits or loss of hidden rows with the same weight; a tensor group shares V."""

    def __init__(self, config: ModelConfig, group: TensorParallelGroup):
        super().__init__()
        self.group, self.dropout = group, config.dropout
        self.weight = nn.Parameter(torch.empty(config.vocab_size // group.size, config.hidden_size))
        sharded(self.weight, Shard(0), group)
        self.part = VocabularyShard(group, len(self.weight)) if group.size > 1 else None

    def forward(
        self, x: torch.Tensor, targets: torch.Tensor | None = None, layout: BatchLayout | None = None
    ) -> torch.Tensor | CrossEntropy:
        """Integer tokens (N,) to rows (m, d); rows (m, d) to logits (N, V), or with targets (N,) to losses."""
        if not x.is_floating_point():
            assert layout is not None, "tokens are embedded with a layout"
            return self._embed(x, layout)
        return self._logits(x) if targets is None else self.loss(x, self.weight, targets)

    def loss(self, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> CrossEntropy:
        """Losses of rows (m, d) against targets (N,); ``weight`` is this module's, however it came here."""
        return linear_cross_entropy(gather_or_copy_input(x, self.group), weight, targets, self.part)

    def _embed(self, tokens: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        if self.part is None:
            rows = F.embedding(tokens, self.weight)
        else:
            ids = tokens - self.part.first
            elsewhere = (ids < 0) | (ids >= len(self.weight))
            rows = F.embedding(ids.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[:, None], 0)
            rows = reduce_or_scatter_output(rows, self.group)
        if not (self.training and self.dropout and layout.dropout_keys is not None):
            return rows
        return apply_dropout(rows, dropout_of(self.dropout, layout.dropout_keys.local_rows, -1, 0))

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """For reading alone: no gradient flows back over ranks."""
        logits = F.linear(gather_or_copy_input(x, self.group), self.weight)
        if self.part is None:
            return logits
        return all_gather(logits.mT.contiguous(), self.group).mT
