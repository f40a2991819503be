"""The token embedding and the head that is tied to it: one module with one weight, which ZeRO gathers as one.

Shapes: N = rows of the micro-batch, m = this rank's rows (N, or N / p with sequence parallelism), d = channels, V =
vocabulary.
"""

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
    """The embedding (V, d) of tokens, and logits or losses of hidden states with the same weight.

    The embedded rows are scaled by ``model.embedding_multiplier``; logits have the weight as it is. The ranks of a
    tensor-parallel group share the vocabulary: each has V / p rows of the weight.
    """

    def __init__(self, config: ModelConfig, group: TensorParallelGroup):
        super().__init__()
        self.group = group
        self.dropout = config.dropout
        self.multiplier = config.embedding_multiplier
        self.weight = nn.Parameter(torch.empty(config.vocab_size // group.size, config.hidden_size))
        sharded(self.weight, Shard(0), group)
        self.part = VocabularyShard(group, len(self.weight)) if group.size > 1 else None

    def forward(
        self, x: torch.Tensor, targets: torch.Tensor | None = None, layout: BatchLayout | None = None
    ) -> torch.Tensor | CrossEntropy:
        """Embed tokens, or compute logits or losses of hidden states: one call for each, so that ZeRO sees them all.

        Args:
            x: tokens (N,) int64 to embed, or hidden states (m, d).
            targets: (N,) int64, for losses of hidden states; None for their logits.
            layout: the layout of the micro-batch, whose keys decide about dropout in training; None drops nothing.

        Returns:
            Hidden states (m, d), logits (N, V), or the ``CrossEntropy`` of the targets.
        """
        if not x.is_floating_point():
            return self._embed(x, layout)
        return self._logits(x) if targets is None else self.loss(x, self.weight, targets)

    def loss(self, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> CrossEntropy:
        """Compute losses of hidden states (m, d) against targets (N,).

        ``weight`` is this module's weight; a pipeline passes it through the outputs of its last part.
        """
        return linear_cross_entropy(gather_or_copy_input(x, self.group), weight, targets, self.part)

    def _embed(self, tokens: torch.Tensor, layout: BatchLayout | None) -> torch.Tensor:
        """Embed tokens (N,) as hidden states (m, d); a rank adds zeros for the tokens of other ranks."""
        if self.part is None:
            rows = F.embedding(tokens, self.weight)
        else:
            ids = tokens - self.part.first
            elsewhere = (ids < 0) | (ids >= len(self.weight))
            rows = F.embedding(ids.masked_fill(elsewhere, 0), self.weight).masked_fill(elsewhere[:, None], 0)
            rows = reduce_or_scatter_output(rows, self.group)
        if self.multiplier != 1:
            rows = rows * self.multiplier
        keys = layout.dropout_keys if layout is not None else None
        if not (self.training and self.dropout and keys is not None):
            return rows
        return apply_dropout(rows, dropout_of(self.dropout, keys.local_rows, -1, 0))

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits (N, V) for reading alone: no gradient flows back over ranks."""
        logits = F.linear(gather_or_copy_input(x, self.group), self.weight)
        if self.part is None:
            return logits
        return all_gather(logits.mT.contiguous(), self.group).mT
