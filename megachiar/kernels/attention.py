"""Causal attention for all tokens, or for the routed ones alone.

Shapes: B = sequences, T = keys of a sequence, S = queries of a sequence (the newest S of the T positions when nothing
is routed), n = routed rows, h = heads, c = channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megachiar.kernels import gpu, triton_attention
from megachiar.kernels.dropout import KeyedDropout
from megachiar.kernels.keyed_attention import keyed_attention

QUERY_CHUNK = 512
"""Queries that share one product: each chunk sees only the keys up to its last position."""


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: KeyedDropout | None = None,
    first_head: int = 0,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of the newest S positions to all keys up to their own.

    Args:
        q: (B, h, S, c).
        k, v: (B, h, T, c) with T >= S.
        dropout: of attention probabilities, with the keys (B * S,) of the queries' rows.
        first_head: number of the first head of q, where ranks share the heads.
        scale: of the products; 1 / sqrt(c) if not given.

    Returns:
        (B, h, S, c).
    """
    queries, keys = q.shape[2], k.shape[2]
    if dropout is not None and dropout.probability > 0:
        at = torch.arange(keys - queries, keys).expand(len(q), -1)
        if _by_triton(q):
            return _triton(q, k, v, at.to(q.device), None, dropout, first_head, scale)
        return keyed_attention(q, k, v, at, dropout, first_head, scale)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    positions = torch.arange(keys, device=q.device)
    mask = positions <= positions[keys - queries :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def routed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    queries: int,
    dropout: KeyedDropout | None = None,
    first_head: int = 0,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of chosen rows alone to all keys of their sequence up to their own position.

    Args:
        q: (n, h, c), queries of the chosen rows.
        k, v: (B, h, T, c).
        rows: (n,) int64, ascending: which of the B * queries rows (sequence by sequence) were chosen.
        queries: S, rows a sequence has. They stand at the newest S of its T positions.
        dropout: of attention probabilities, with the keys (n,) of the chosen rows.
        first_head: number of the first head of q, where ranks share the heads.
        scale: of the products; 1 / sqrt(c) if not given.

    Returns:
        (n, h, c), in the order of ``rows``. No (S, T) tensor is kept for rows that were not chosen.
    """
    if len(rows) == 0:  # keys and values get a gradient of zeros, for ranks reduce alike
        return q + (k[:, :, :0].sum() + v[:, :, :0].sum())
    sequences, keys = k.shape[0], k.shape[2]
    if len(rows) == sequences * queries:
        packed = q.unflatten(0, (sequences, queries)).transpose(1, 2)
        return causal_attention(packed, k, v, dropout, first_head, scale).transpose(1, 2).flatten(0, 1)
    packing = Packing(rows, sequences, queries)
    grid = packing.pack(q).transpose(1, 2)  # (B, h, widest, c)
    at = packing.pack(rows % queries + (keys - queries))
    if dropout is not None:
        dropout = dropout._replace(keys=packing.pack(dropout.keys).flatten())
    if _by_triton(q):
        mixed = _triton(grid, k, v, at, packing.counts, dropout, first_head, scale)
    elif dropout is None or dropout.probability == 0:
        mixed = _by_position(grid, k, v, at, scale)
    else:
        mixed = keyed_attention(grid, k, v, at, dropout, first_head, scale)
    return packing.unpack(mixed.transpose(1, 2))


def attention_among(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    sequences: int,
    queries: int,
    dropout: KeyedDropout | None = None,
    first_head: int = 0,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of chosen rows to the chosen rows of their sequence up to themselves: to no other.

    Args:
        q, k, v: (n, h, c), of the chosen rows.
        rows: (n,) int64, ascending: which of the B * S rows (sequence by sequence) were chosen.
        sequences, queries: B and S.
        dropout: of attention probabilities, with the keys (n,) of the chosen rows.
        first_head: number of the first head of q, where ranks share the heads.
        scale: of the products; 1 / sqrt(c) if not given.

    Returns:
        (n, h, c), in the order of ``rows``.
    """
    if len(rows) == 0:
        return q + k + v  # keys and values get a gradient of zeros, for ranks reduce alike
    packing = Packing(rows, sequences, queries)
    # The chosen rows of a sequence lie side by side: among them it is causal attention. Padding comes after them all.
    grid = (packing.pack(x).transpose(1, 2) for x in (q, k, v))
    if dropout is not None:
        dropout = dropout._replace(keys=packing.pack(dropout.keys).flatten())
    return packing.unpack(causal_attention(*grid, dropout, first_head, scale).transpose(1, 2))


def cached_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor, keys_at: torch.Tensor
) -> torch.Tensor:
    """Attention of queries (B, h, S, c) at positions ``at`` (B, S) to keys (B, h, T, c) at positions ``keys_at`` (B, T)
    up to their own; a query that sees none gets the mean of the values."""
    mask = keys_at[:, None, None, :] <= at[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~mask.any(-1, keepdim=True))


class Packing:
    """Chosen rows of each sequence side by side, in a (B, widest) grid whose rest is padding.

    Args:
        rows: (n,) int64, ascending, at least one: which of the B * S rows (sequence by sequence) were chosen.
        sequences, queries: B and S.

    Attributes:
        counts: (B,) chosen rows of each sequence.
    """

    def __init__(self, rows: torch.Tensor, sequences: int, queries: int):
        sequence = rows // queries
        self.counts = counts = torch.bincount(sequence, minlength=sequences)
        self.sequences, self.widest = sequences, int(counts.max())
        self.full = len(rows) == sequences * self.widest
        number = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[sequence]
        self.slot = sequence * self.widest + number

    def pack(self, x: torch.Tensor, padding: float = 0) -> torch.Tensor:
        """(n, ...) to (B, widest, ...)."""
        if not self.full:
            x = x.new_full((self.sequences * self.widest, *x.shape[1:]), padding).index_copy(0, self.slot, x)
        return x.unflatten(0, (self.sequences, self.widest))

    def unpack(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, widest, ...) to (n, ...)."""
        flat = grid.flatten(0, 1)
        return flat if self.full else flat.index_select(0, self.slot)


def _by_triton(q: torch.Tensor) -> bool:
    return gpu.has_kernels(q.device) and triton_attention.supports(q)


def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    at: torch.Tensor,
    counts: torch.Tensor | None,
    dropout: KeyedDropout | None,
    first_head: int,
    scale: float | None,
) -> torch.Tensor:
    """Of queries (B, h, S, c) at positions ``at`` (B, S), of which ``counts`` (B,) are valid; all if not given."""
    mask = None
    if dropout is not None and dropout.probability > 0:
        mask = triton_attention.Mask.of(dropout, len(q), first_head, q.shape[1], k.shape[2])
    if counts is None:
        counts = torch.full((len(q),), q.shape[2], device=q.device)
    return triton_attention.attend(q, k, v, at, counts, scale, mask)


def _by_position(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Queries (B, h, S, c) at positions ``at`` (B, S), ascending but for padding; chunked by keys they can see."""
    chunks = at.split(QUERY_CHUNK, 1)
    # One copy from the device for all chunks; a single chunk sees (nearly) all keys anyway.
    seen = [k.shape[2]] if len(chunks) == 1 else (torch.stack([c.max() for c in chunks]) + 1).tolist()
    outputs = []
    for part, chunk, keys in zip(q.split(QUERY_CHUNK, 2), chunks, seen, strict=True):
        mask = torch.arange(keys, device=q.device) <= chunk[:, None, :, None]  # (B, 1, s, keys)
        outputs.append(
            F.scaled_dot_product_attention(part, k[:, :, :keys], v[:, :, :keys], attn_mask=mask, scale=scale)
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
