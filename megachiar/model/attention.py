"""Self-attention sub-layer: queries of chosen rows, keys and values of all.

Shapes: N = B * S rows, n = rows of them that take this operator, d = channels, h = heads, c = d / h.
"""

from __future__ import annotations

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.attention import causal_attention, routed_attention
from megachiar.kernels.rope import rotary_table, rotate
from megachiar.model.cache import LayerCache
from megachiar.model.grid import Grid
from megachiar.model.norm import residual_norm


class SelfAttention(nn.Module):
    """``LN_attn(x + attention(x))`` (norm: post) or ``x + attention(LN_attn(x))`` (norm: pre)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.hidden_size
        self.pre, self.heads, self.dropout = config.norm == "pre", config.num_attention_heads, config.dropout
        self.rope_base, self.longest = config.attention.rope_base, config.max_sequence_length
        # Three products, not one: queries are made for chosen rows only, keys and values for all.
        self.query = nn.Linear(d, d)
        self.key_value = nn.Linear(d, 2 * d)
        self.output = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d, eps=config.norm_epsilon)

    def forward(
        self, x: torch.Tensor, chosen: torch.Tensor, rows: torch.Tensor | None, grid: Grid, cache: LayerCache | None
    ) -> torch.Tensor:
        """
        Args:
            x: all rows (N, d).
            chosen: the rows (n, d) that take this operator.
            rows: their numbers (n,), ascending; None if they are all.
            grid: how the N rows lie.
            cache: of earlier positions, extended by these.

        Returns:
            (n, d): the sub-layer's result for the chosen rows, residual and norm included.
        """
        keys_from = self.norm(x) if self.pre else x
        queries_from = chosen if not self.pre else keys_from if rows is None else keys_from.index_select(0, rows)
        cos, sin = self._table(grid, x)
        k, v = self.key_value(keys_from).view(grid.sequences, grid.length, 2, self.heads, -1).unbind(2)
        k = rotate(k, cos[:, None], sin[:, None]).transpose(1, 2)  # (B, h, S, c)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        q = self.query(queries_from).unflatten(-1, (self.heads, -1))  # (n, h, c)
        dropout = self.dropout if self.training else 0.0
        if rows is None:
            q = rotate(q.unflatten(0, (grid.sequences, grid.length)), cos[:, None], sin[:, None]).transpose(1, 2)
            mixed = causal_attention(q, k, v, dropout).transpose(1, 2).flatten(0, 1)
        else:
            at = rows % grid.length
            q = rotate(q, cos[at][:, None], sin[at][:, None])
            mixed = routed_attention(q, k, v, rows, grid.length, dropout)
        return residual_norm(chosen, self.output(mixed.flatten(-2)), None if self.pre else self.norm)

    def _table(self, grid: Grid, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (S, c) of this pass's positions."""
        length = max(self.longest, grid.past + grid.length)
        cos, sin = rotary_table(length, x.shape[-1] // self.heads, self.rope_base, x.device, x.dtype)
        return cos[grid.past : grid.past + grid.length], sin[grid.past : grid.past + grid.length]
