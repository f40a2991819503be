"""The RBF mixing sub-layer, the paper's ablation: similarity in a space of random Fourier features.

The features are ``phi(x) = [cos(x W / sqrt(R)), sin(x W / sqrt(R))]`` with W drawn once. A token takes the
softmax-weighted mean of ``phi`` over itself and the tokens before it; the published code looks at later ones too. A
linear map takes it back to d channels.

Shapes: m = this rank's rows, n = rows that are routed to RBF mixing, d = channels, R = frequencies (``rbf.features``);
phi has 2R numbers.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.attention import routed_attention
from megachiar.kernels.attention_options import AttentionOptions
from megachiar.model.batch_layout import BatchLayout, dropout_of
from megachiar.model.dispatch import OperatorTokens
from megachiar.model.kv_cache import LayerCache
from megachiar.model.norm import RowNorm, residual_norm
from megachiar.parallel.collectives import all_gather_rows
from megachiar.parallel.linear import ReplicatedLinear
from megachiar.topology import TensorParallelGroup


class RbfMixing(nn.Module):
    """The sub-layer ``LN_rbf(x + W_o softmax(phi phi^T) phi)`` (norm: post), or with LN_rbf before it (norm: pre).

    Its weights are small and whole on every rank. With sequence parallelism each rank mixes its own rows, and the
    features (2R numbers a row) of all rows are gathered.
    """

    frequencies: torch.Tensor

    def __init__(self, config: ModelConfig, layer: int, group: TensorParallelGroup):
        super().__init__()
        d, features = config.hidden_size, config.rbf.features
        self.pre = config.norm == "pre"
        self.dropout = config.dropout
        self.layer = layer
        self.group = group
        self.spread = math.sqrt(2 * config.rbf.gamma)
        self.register_buffer("frequencies", torch.zeros(d, features))  # drawn by init.py like a weight, never trained
        self.output = ReplicatedLinear(2 * features, d, group)
        self.norm = RowNorm(d, config.norm_epsilon, group)

    def forward(
        self,
        x: torch.Tensor,
        routed: torch.Tensor,
        operator_tokens: OperatorTokens,
        layout: BatchLayout,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        """Compute the sub-layer for the routed rows.

        Args:
            x: this rank's rows (m, d).
            routed: those of them (n, d) that are routed to RBF mixing.
            operator_tokens: which rows they are.
            layout: the layout of the micro-batch.
            cache: features of earlier positions; this pass appends its own. None in training.

        Returns:
            The sub-layer's result (n, d) for the routed rows, residual and norm included.
        """
        phi = self._features(self.norm(x) if self.pre else x)  # (m, 2R)
        whole = all_gather_rows(phi, self.group) if self.group.shards_rows else phi
        keys = whole.view(layout.sequences, 1, layout.length, -1)
        if cache is not None:
            cache.append(keys[:, 0, :, None, None])
        rows = operator_tokens.local_indices + layout.local_slice.start
        dropout = None
        if self.training and self.dropout and layout.dropout_keys is not None:
            dropout = dropout_of(self.dropout, layout.dropout_keys.all_rows.index_select(0, rows), self.layer, 1)
        queries = phi.index_select(0, operator_tokens.local_indices)[:, None]
        if cache is not None:
            mixed = cache.attend(queries, layout.routed_rows(rows), scale=1.0)
        else:
            options = AttentionOptions(dropout=dropout, scale=1.0, document_starts=layout.document_starts_of(rows))
            mixed = routed_attention(queries, keys, keys, layout.routed_rows(rows), options)
        return residual_norm(routed, self.output(mixed.squeeze(1)), None if self.pre else self.norm)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the features ``phi`` (m, 2R) of rows (m, d)."""
        angle = x @ self.frequencies.to(x.dtype) / math.sqrt(self.frequencies.shape[1])
        return torch.cat([angle.cos(), angle.sin()], -1)
