"""Self-attention sub-layer: queries of routed rows, keys and values of all, or of the routed ones too.

Shapes: N = B * S rows, n = rows of them that take this operator, d = channels, h = heads (of this rank where they are
shared out over a tensor group), c = channels of a head.
"""

from __future__ import annotations

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.attention import (
    Packing,
    cached_attention,
    causal_attention,
    routed_attention,
    routed_self_attention,
)
from megachiar.kernels.rope import keys_and_values, rotary_table, rotate
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

NEVER_SEEN = 2**62
"""Position of a key that is padding."""


class SelfAttention(nn.Module):
    """``LN_attn(x + attention(x))`` (norm: post) or ``x + attention(LN_attn(x))`` (norm: pre)."""

    def __init__(self, config: ModelConfig, layer: int, group: TensorParallelGroup):
        super().__init__()
        d = config.hidden_size
        self.pre, self.dropout, self.layer, self.group = config.norm == "pre", config.dropout, layer, group
        self.heads, self.head_size = config.num_attention_heads // group.size, config.head_size
        self.rope_base, self.longest = config.attention.rope_base, config.max_sequence_length
        self.keys_are_routed = config.attention.keys == "routed"
        # Three products, not one: queries are made for routed rows only, keys and values for all.
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
        """
        Args:
            x: this rank's rows (N, d), or a block of them with sequence parallelism.
            routed: those of them (n, d) that take this operator.
            operator_tokens: which they are; None if they are all.
            layout: of the rows.
            cache: of earlier positions, extended by these.

        Returns:
            As ``routed``: the sub-layer's result for these rows, residual and norm included.
        """
        rows = operator_tokens.indices if operator_tokens is not None else None
        if rows is not None and self.keys_are_routed:
            mixed = self._attend_to_routed(routed, operator_tokens, layout, cache)
        else:
            mixed = self._attend_to_all(x, routed, rows, layout, cache)
        branch_output = self.output(
            mixed.flatten(-2), operator_tokens.counts_per_rank if operator_tokens is not None else None
        )
        return residual_norm(routed, branch_output, None if self.pre else self.norm)

    def _attend_to_all(
        self,
        x: torch.Tensor,
        routed: torch.Tensor,
        rows: torch.Tensor | None,
        layout: BatchLayout,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        """Routed rows to all of their sequence: (n, h, c)."""
        q, kv = self._project(x, routed, rows, layout)
        cos, sin = self._table(layout, x)
        k, v = (y.transpose(1, 2) for y in keys_and_values(kv, cos[:, None], sin[:, None]))  # (B, h, S, c)
        if cache is not None:
            k, v = cache.extend(k, v)
        if rows is None:
            q = rotate(q.unflatten(0, (layout.sequences, layout.length)), cos[:, None], sin[:, None]).transpose(1, 2)
            mixed = causal_attention(
                q, k, v, self._dropout(layout, None), self.first_head, document_starts=layout.document_starts
            )
            return mixed.transpose(1, 2).flatten(0, 1)
        at = rows % layout.length
        q = rotate(q, cos[at][:, None], sin[at][:, None])
        return routed_attention(
            *(q, k, v, rows, layout.length, self._dropout(layout, rows), self.first_head),
            document_starts=layout.document_starts_of(rows),
        )

    def _attend_to_routed(
        self, routed: torch.Tensor, operator_tokens: OperatorTokens, layout: BatchLayout, cache: LayerCache | None
    ) -> torch.Tensor:
        """Routed rows to the routed rows of their sequence: (n, h, c)."""
        rows = operator_tokens.indices
        normed = self.norm(routed) if self.pre else routed
        if self.group.size > 1:
            q, kv = query_key_value_of_routed(normed, operator_tokens.counts_per_rank, self.query, self.key_value)
        else:
            q, kv = self.query(normed), self.key_value(normed)
        at = rows % layout.length
        cos, sin = (table[at][:, None] for table in self._table(layout, routed))
        q = rotate(q.unflatten(-1, (self.heads, self.head_size)), cos, sin)
        k, v = keys_and_values(kv.unflatten(-1, (2, self.heads, self.head_size)), cos, sin)
        if cache is None:
            return routed_self_attention(
                *(q, k, v, rows, layout.sequences, layout.length, self._dropout(layout, rows), self.first_head),
                document_starts=layout.document_starts_of(rows),
            )
        if len(rows) == 0:  # nothing to ask, nothing to remember
            return q
        packing, at = Packing(rows, layout.sequences, layout.length), at + layout.cache_length
        q, k, v = (packing.pack(y).transpose(1, 2) for y in (q, k, v))
        k, v, keys_at = cache.extend_at(k, v, packing.pack(at, padding=NEVER_SEEN))
        mixed = cached_attention(q, k, v, packing.pack(at), keys_at)
        return packing.unpack(mixed.transpose(1, 2))

    @property
    def first_head(self) -> int:
        """Number of this rank's first head."""
        return self.group.rank * self.heads

    def _project(
        self, x: torch.Tensor, routed: torch.Tensor, rows: torch.Tensor | None, layout: BatchLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (n, h, c), keys and values (B, S, 2, h, c)."""
        keys_from = self.norm(x) if self.pre else x
        if self.group.size > 1:
            q, kv = query_key_value(keys_from, rows, self.query, self.key_value)
        else:
            indexed = IndexedRows(keys_from, rows) if rows is not None else None
            queries_from = routed if not self.pre else keys_from if rows is None else keys_from.index_select(0, rows)
            q, kv = self.query(queries_from, indexed), self.key_value(keys_from)
        kv = kv.view(layout.sequences, layout.length, 2, self.heads, self.head_size)
        return q.unflatten(-1, (self.heads, self.head_size)), kv

    def _dropout(self, layout: BatchLayout, rows: torch.Tensor | None):
        if not (self.training and self.dropout and layout.dropout_keys is not None):
            return None
        keys = layout.dropout_keys.all_rows if rows is None else layout.dropout_keys.all_rows.index_select(0, rows)
        return dropout_of(self.dropout, keys, self.layer, 0)

    def _table(self, layout: BatchLayout, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (S, c) of this pass's positions."""
        end = layout.cache_length + layout.length
        cos, sin = rotary_table(max(self.longest, end), self.head_size, self.rope_base, x.device, x.dtype)
        return cos[layout.cache_length : end], sin[layout.cache_length : end]
