"""The self-attention sub-layer: queries of the routed rows, keys and values of all rows or of the routed ones alone.

Shapes: N = B * S rows, n = rows of them that are routed to attention, d = channels, h = heads, c = channels of a head.
Where a tensor-parallel group shares the heads, h counts this rank's heads.
"""

from __future__ import annotations

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.attention import causal_attention, routed_attention, routed_self_attention
from megachiar.kernels.attention_options import AttentionOptions
from megachiar.kernels.rope import keys_and_values, rotary_table, rotate, rotate_keys, rotated_rows
from megachiar.kernels.routed_rows import RoutedRows
from megachiar.model.batch_layout import BatchLayout, dropout_of
from megachiar.model.dispatch import OperatorTokens
from megachiar.model.kv_cache import LayerCache
from megachiar.model.norm import RowNorm, residual_norm
from megachiar.parallel.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    query_key_value,
    query_key_value_of_routed,
)
from megachiar.parallel.rows import IndexedRows
from megachiar.topology import TensorParallelGroup


class SelfAttention(nn.Module):
    """The sub-layer ``LN_attn(x + attention(x))`` (norm: post) or ``x + attention(LN_attn(x))`` (norm: pre)."""

    def __init__(self, config: ModelConfig, layer: int, group: TensorParallelGroup):
        super().__init__()
        d = config.hidden_size
        self.pre = config.norm == "pre"
        self.dropout = config.dropout
        self.layer = layer
        self.group = group
        self.heads = config.num_attention_heads // group.size
        self.head_size = config.head_size
        self.rope_base = config.attention.rope_base
        self.longest = config.max_sequence_length
        self.keys_are_routed = config.attention.keys == "routed"
        # Queries and keys with values are products of their own: queries are made for routed rows alone.
        self.query = ColumnParallelLinear(d, d, group)
        self.key_value = ColumnParallelLinear(d, 2 * d, group, blocks=2)
        self.output = RowParallelLinear(d, d, group)
        self.norm = RowNorm(d, config.norm_epsilon, group)

    def forward(
        self,
        x: torch.Tensor,
        routed: torch.Tensor,
        operator_tokens: OperatorTokens | None,
        layout: BatchLayout,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        """Compute the sub-layer for the routed rows.

        Args:
            x: this rank's rows: (N, d), or its block of them with sequence parallelism.
            routed: those of them that are routed to attention: (n, d), or fewer with sequence parallelism.
            operator_tokens: which rows they are; None if all rows take attention.
            layout: the layout of the micro-batch.
            cache: keys and values of earlier positions; this pass appends its own. None in training.

        Returns:
            The sub-layer's result for the routed rows, residual and norm included, in the shape of ``routed``.
        """
        if cache is not None and len(routed) == 0 and self.group.size == 1:
            if not self.keys_are_routed:
                self._keep(x, layout, cache)
            return routed
        if operator_tokens is None:
            mixed = self._attend_to_all(x, routed, None, layout, cache)
        elif self.keys_are_routed:
            mixed = self._attend_to_routed(routed, operator_tokens, layout, cache)
        else:
            mixed = self._attend_to_all(x, routed, operator_tokens.indices, layout, cache)
        counts_per_rank = operator_tokens.counts_per_rank if operator_tokens is not None else None
        branch_output = self.output(mixed.flatten(-2), counts_per_rank)
        return residual_norm(routed, branch_output, None if self.pre else self.norm)

    def queries_and_keys(self, x: torch.Tensor, layout: BatchLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rotated queries and keys (B, h, S, c) of all rows ``x`` (m, d), for whoever looks at the weights."""
        q, kv = self._project(x, x, None, layout)
        cos, sin = self._table(layout, x)
        q = rotate(q.unflatten(0, (layout.sequences, layout.length)), cos, sin)
        k, _ = keys_and_values(kv, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    def _attend_to_all(
        self,
        x: torch.Tensor,
        routed: torch.Tensor,
        indices: torch.Tensor | None,
        layout: BatchLayout,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        """Let the routed rows attend to all rows of their sequence: (n, h, c)."""
        q, kv = self._project(x, routed, indices, layout)
        if cache is None and indices is None:
            form = layout.length, max(self.longest, layout.length), self.rope_base
            q, k, v = (y.transpose(1, 2) for y in rotated_rows(q, kv.flatten(0, 1), *form))  # (B, h, S, c)
            return causal_attention(q, k, v, self._options(layout, None)).transpose(1, 2).flatten(0, 1)
        cos, sin = self._table(layout, x)
        if cache is not None:
            cache.append(rotate_keys(kv, cos, sin))
            rows = layout.routed_rows(layout.all_indices(x.device) if indices is None else indices)
            return cache.attend(rotate(q, *self._table_of(rows, layout, x)), rows)
        assert indices is not None, "a pass without a cache returned above"
        k, v = (y.transpose(1, 2) for y in keys_and_values(kv, cos, sin))  # (B, h, S, c)
        rows = layout.routed_rows(indices)
        q = rotate(q, *self._table_of(rows, layout, x))
        return routed_attention(q, k, v, rows, self._options(layout, indices))

    def _keep(self, x: torch.Tensor, layout: BatchLayout, cache: LayerCache) -> None:
        """Keep keys and values of all rows, of which none attends. There is one rank."""
        kv = self.key_value(self.norm(x) if self.pre else x)
        kv = kv.view(layout.sequences, layout.length, 2, self.heads, self.head_size)
        cache.append(rotate_keys(kv, *self._table(layout, x)))

    def _attend_to_routed(
        self, routed: torch.Tensor, operator_tokens: OperatorTokens, layout: BatchLayout, cache: LayerCache | None
    ) -> torch.Tensor:
        """Let the routed rows attend to the routed rows of their sequence: (n, h, c)."""
        rows = layout.routed_rows(operator_tokens.indices)
        normed = self.norm(routed) if self.pre else routed
        if self.group.size > 1:
            q, kv = query_key_value_of_routed(normed, operator_tokens.counts_per_rank, self.query, self.key_value)
        else:
            q, kv = self.query(normed), self.key_value(normed)
        cos, sin = self._table_of(rows, layout, routed)
        q = rotate(q.unflatten(-1, (self.heads, self.head_size)), cos, sin)
        kv = kv.unflatten(-1, (2, self.heads, self.head_size))
        if cache is not None:
            cache.append_routed(rotate_keys(kv, cos, sin), rows)
            return cache.attend(q, rows, keys_are_routed=True)
        return routed_self_attention(q, *keys_and_values(kv, cos, sin), rows, self._options(layout, rows.indices))

    @property
    def first_head(self) -> int:
        """The number of this rank's first head."""
        return self.group.rank * self.heads

    def _project(
        self, x: torch.Tensor, routed: torch.Tensor, indices: torch.Tensor | None, layout: BatchLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute queries (n, h, c) of the routed rows, and keys and values (B, S, 2, h, c) of all rows."""
        keys_from = self.norm(x) if self.pre else x
        if self.group.size > 1:
            q, kv = query_key_value(keys_from, indices, self.query, self.key_value)
        else:
            indexed = IndexedRows(keys_from, indices) if indices is not None else None
            queries_from = routed
            if self.pre:
                queries_from = keys_from if indices is None else keys_from.index_select(0, indices)
            q, kv = self.query(queries_from, indexed), self.key_value(keys_from)
        kv = kv.view(layout.sequences, layout.length, 2, self.heads, self.head_size)
        return q.unflatten(-1, (self.heads, self.head_size)), kv

    def _options(self, layout: BatchLayout, indices: torch.Tensor | None) -> AttentionOptions:
        """Return the options of attention for the rows at ``indices`` (n,) among all N, or for all rows if None."""
        dropout = None
        if self.training and self.dropout and layout.dropout_keys is not None:
            keys = layout.dropout_keys.all_rows
            keys = keys if indices is None else keys.index_select(0, indices)
            dropout = dropout_of(self.dropout, keys, self.layer, 0)
        return AttentionOptions(
            dropout=dropout,
            first_head=self.first_head,
            document_starts=layout.document_starts_of(indices),
            document_rows=layout.document_rows if indices is None else None,
        )

    def _table(self, layout: BatchLayout, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of this pass's positions: (S, 1, c), or (B, S, 1, c) behind a cache."""
        cos, sin = self._whole_table(layout, x)
        if layout.cached_positions is None:
            return cos[: layout.length, None], sin[: layout.length, None]
        positions, shape = layout.cached_positions.flatten(), (layout.sequences, layout.length, 1, -1)
        return cos.index_select(0, positions).view(shape), sin.index_select(0, positions).view(shape)

    def _table_of(self, rows: RoutedRows, layout: BatchLayout, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin (n, 1, c) of the positions of routed rows."""
        cos, sin = self._whole_table(layout, x)
        if layout.cached_positions is None:
            positions = rows.position
        else:
            positions = layout.cached_positions.flatten()
            positions = positions if rows.are_all else positions.index_select(0, rows.indices)
        return cos.index_select(0, positions)[:, None], sin.index_select(0, positions)[:, None]

    def _whole_table(self, layout: BatchLayout, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rotary_table(max(self.longest, layout.length), self.head_size, self.rope_base, x.device, x.dtype)
