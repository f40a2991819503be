"""Causal attention for all tokens, or for the routed ones alone.

Shapes: B = sequences, T = keys of a sequence, S = queries of a sequence (the newest S of the T positions when nothing
is routed), n = routed rows, h = heads, c = channels of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megachiar.kernels.dropout import KeyedDropout, column_keys, kept, site_keys

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
    positions = torch.arange(keys - queries, keys, device=q.device)
    if dropout is not None:
        at, keyed = positions.expand(len(q), -1), site_keys(dropout).view(len(q), queries)
        return _KeyedAttention.apply(q, k, v, at, keyed, dropout.probability, first_head, scale)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    mask = torch.arange(keys, device=q.device) <= positions[:, None]
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
    sequence = rows // queries
    position = rows % queries + (keys - queries)
    counts = torch.bincount(sequence, minlength=sequences)
    widest = int(counts.max())
    # Row r of the chosen goes to slot (its sequence, its number within it) of a (B, widest) grid; the rest is padding.
    slot = sequence * widest + torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[sequence]
    full = len(rows) == sequences * widest
    grid = q if full else q.new_zeros(sequences * widest, *q.shape[1:]).index_copy(0, slot, q)
    at = torch.zeros(sequences * widest, dtype=torch.long, device=rows.device).index_copy_(0, slot, position)
    grid = grid.unflatten(0, (sequences, widest)).transpose(1, 2)  # (B, h, widest, c)
    at = at.view(sequences, widest)
    if dropout is None:
        mixed = _by_position(grid, k, v, at, scale)
    else:
        keyed = site_keys(dropout)
        if not full:
            keyed = keyed.new_zeros(sequences * widest).index_copy_(0, slot, keyed)
        keyed = keyed.view(sequences, widest)
        mixed = _KeyedAttention.apply(grid, k, v, at, keyed, dropout.probability, first_head, scale)
    mixed = mixed.transpose(1, 2).flatten(0, 1)  # (B * widest, h, c)
    return mixed if full else mixed.index_select(0, slot)


def _by_position(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Queries (B, h, S, c) at positions ``at`` (B, S), ascending but for padding; chunked by keys they can see."""
    chunks = at.split(QUERY_CHUNK, 1)
    outputs = []
    for part, chunk, keys in zip(q.split(QUERY_CHUNK, 2), chunks, _seen(chunks, k.shape[2]), strict=True):
        mask = torch.arange(keys, device=q.device) <= chunk[:, None, :, None]  # (B, 1, s, keys)
        outputs.append(
            F.scaled_dot_product_attention(part, k[:, :, :keys], v[:, :, :keys], attn_mask=mask, scale=scale)
        )
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)


def _seen(chunks: tuple[torch.Tensor, ...], keys: int) -> list[int]:
    """How many keys the queries of each chunk of positions can see."""
    # One copy from the device for all chunks; a single chunk sees (nearly) all keys anyway.
    return [keys] if len(chunks) == 1 else (torch.stack([c.max() for c in chunks]) + 1).tolist()


class _KeyedAttention(torch.autograd.Function):
    """Attention with keyed dropout of probabilities. These are computed again in the backward pass, not kept.

    ``at`` (B, S) are the queries' positions, ``keyed`` (B, S) int32 their rows' keys at this place.
    """

    @staticmethod
    def forward(ctx, q, k, v, at, keyed, probability, first_head, scale):
        ctx.probability, ctx.first_head = probability, first_head
        ctx.scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        chunks = at.split(QUERY_CHUNK, 1)
        ctx.seen = _seen(chunks, k.shape[2])
        outputs, scales = [], []
        for start, chunk, keys in zip(range(0, q.shape[2], QUERY_CHUNK), chunks, ctx.seen, strict=True):
            rows = slice(start, start + QUERY_CHUNK)
            scores = _scores(q[:, :, rows], k[:, :, :keys], chunk, ctx.scale)
            total = scores.logsumexp(-1, keepdim=True)
            weights = scores.sub_(total).exp_() * _mask(ctx, keyed[:, rows], q.shape[1], keys)
            outputs.append(weights.to(v.dtype) @ v[:, :, :keys])
            scales.append(total)
        output = torch.cat(outputs, 2).mul_(1 / (1 - probability))
        ctx.save_for_backward(q, k, v, at, keyed, output, torch.cat(scales, 2))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, at, keyed, output, scales = ctx.saved_tensors
        of_q = torch.empty_like(q)
        of_k, of_v = torch.zeros_like(k), torch.zeros_like(v)
        keep = 1 / (1 - ctx.probability)
        inner = (gradient.to(scales.dtype) * output).sum(-1, keepdim=True)  # (B, h, S, 1)
        for start, keys in zip(range(0, q.shape[2], QUERY_CHUNK), ctx.seen, strict=True):
            rows = slice(start, start + QUERY_CHUNK)
            weights = _scores(q[:, :, rows], k[:, :, :keys], at[:, rows], ctx.scale).sub_(scales[:, :, rows]).exp_()
            mask = _mask(ctx, keyed[:, rows], q.shape[1], keys)
            of_output = gradient[:, :, rows]
            of_v[:, :, :keys] += ((weights * mask).to(v.dtype).mT @ of_output) * keep
            of_weights = (of_output @ v[:, :, :keys].mT).to(weights.dtype).mul_(mask).mul_(keep)
            of_scores = (of_weights.sub_(inner[:, :, rows]).mul_(weights)).mul_(ctx.scale).to(q.dtype)
            of_q[:, :, rows] = of_scores @ k[:, :, :keys]
            of_k[:, :, :keys] += of_scores.mT @ q[:, :, rows]
        return of_q, of_k, of_v, None, None, None, None, None


def _scores(q: torch.Tensor, k: torch.Tensor, at: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled products (B, h, s, keys) in fp32 (fp64), -inf where a key stands behind its query."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    behind = torch.arange(k.shape[2], device=q.device) > at[:, None, :, None]
    return (q @ k.mT).to(wide).mul_(scale).masked_fill_(behind, -torch.inf)


def _mask(ctx, keyed: torch.Tensor, heads: int, keys: int) -> torch.Tensor:
    """(B, h, s, keys), True where a probability stays."""
    of_heads = column_keys(ctx.first_head, heads, keyed.device)[:, None]
    rows = (keyed[:, None] ^ (of_heads * 5 + 1))[..., None]  # (B, h, s, 1)
    return kept(rows, column_keys(0, keys, keyed.device), ctx.probability)
