"""Causal attention for all tokens, or for the routed ones alone.

Shapes: B = sequences, T = keys of a sequence, S = queries of a sequence (the newest S of the T positions when nothing
is routed), n = routed rows, h = heads, c = channels of a head.

``since`` is where each query's document begins: it sees no key before. Without it a sequence is one document.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megachiar.kernels import gpu, triton_attention
from megachiar.kernels.dropout import KeyedDropout
from megachiar.kernels.keyed_attention import keyed_attention

QUERY_CHUNK = 224
"""Queries, about, that share one product: each chunk sees only the keys up to its last position."""
ROUNDED_TO = 32
"""Queries and keys of a chunk are rounded up to a multiple: a CPU compiles products of 16-bit types for each size."""


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: KeyedDropout | None = None,
    first_head: int = 0,
    scale: float | None = None,
    since: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the newest S positions to all keys up to their own.

    Args:
        q: (B, h, S, c).
        k, v: (B, h, T, c) with T >= S.
        dropout: of attention probabilities, with the keys (B * S,) of the queries' rows.
        first_head: number of the first head of q, where ranks share the heads.
        scale: of the products; 1 / sqrt(c) if not given.
        since: (B, S) positions.

    Returns:
        (B, h, S, c).
    """
    queries, keys = q.shape[2], k.shape[2]
    dropped = dropout is not None and dropout.probability > 0
    if dropped or since is not None:
        at = torch.arange(keys - queries, keys).expand(len(q), -1)
        if _by_triton(q):
            return _triton(q, k, v, at.to(q.device), since, None, dropout, first_head, scale)
        if dropped:
            return keyed_attention(q, k, v, at, dropout, first_head, scale, since)
        return _by_position(q, k, v, None, at.to(q.device), since, scale)
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
    since: torch.Tensor | None = None,
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
        since: (n,) positions.

    Returns:
        (n, h, c), in the order of ``rows``. No (S, T) tensor is kept for rows that were not chosen.
    """
    if len(rows) == 0:  # keys and values get a gradient of zeros, for ranks reduce alike
        return q + (k[:, :, :0].sum() + v[:, :, :0].sum())
    sequences, keys = k.shape[0], k.shape[2]
    if len(rows) == sequences * queries:
        packed = q.unflatten(0, (sequences, queries)).transpose(1, 2)
        since = since.view(sequences, queries) if since is not None else None
        return causal_attention(packed, k, v, dropout, first_head, scale, since).transpose(1, 2).flatten(0, 1)
    packing = Packing(rows, sequences, queries, _rounding(q))
    since = packing.pack(since) if since is not None else None
    at = packing.pack(rows % queries + (keys - queries))
    if dropout is not None:
        dropout = dropout._replace(keys=packing.pack(dropout.keys).flatten())
    by_triton = _by_triton(q)
    if not by_triton and (dropout is None or dropout.probability == 0):
        return _by_position(q, k, v, packing, at, since, scale)
    grid = packing.grid(q)
    if by_triton:
        mixed = _triton(grid, k, v, at, since, packing.counts, dropout, first_head, scale)
    else:
        mixed = keyed_attention(grid, k, v, at, dropout, first_head, scale, since)
    return packing.rows_of(mixed)


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
    since: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of chosen rows to the chosen rows of their sequence up to themselves: to no other.

    Args:
        q, k, v: (n, h, c), of the chosen rows.
        rows: (n,) int64, ascending: which of the B * S rows (sequence by sequence) were chosen.
        sequences, queries: B and S.
        dropout: of attention probabilities, with the keys (n,) of the chosen rows.
        first_head: number of the first head of q, where ranks share the heads.
        scale: of the products; 1 / sqrt(c) if not given.
        since: (n,) positions.

    Returns:
        (n, h, c), in the order of ``rows``.
    """
    if len(rows) == 0:
        return q + k + v  # keys and values get a gradient of zeros, for ranks reduce alike
    packing = Packing(rows, sequences, queries, _rounding(q))
    # The chosen rows of a sequence lie side by side: among them it is causal attention. Padding comes after them all.
    grid = (packing.grid(x) for x in (q, k, v))
    if dropout is not None:
        dropout = dropout._replace(keys=packing.pack(dropout.keys).flatten())
    if since is not None:  # of the first chosen row of the document, its number among those of the sequence
        first = torch.searchsorted(rows, rows - rows % queries + since)
        since = packing.pack(first - packing.starts.index_select(0, rows // queries)).cummax(1).values
    return packing.rows_of(causal_attention(*grid, dropout, first_head, scale, since))


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
        rounding: the grid's width is a multiple of it.

    Attributes:
        counts: (B,) chosen rows of each sequence.
        starts: (B,) of them before each sequence.
    """

    def __init__(self, rows: torch.Tensor, sequences: int, queries: int, rounding: int = 1):
        sequence = rows // queries
        self.counts = counts = torch.bincount(sequence, minlength=sequences)
        self.sequences, self.widest = sequences, -(-int(counts.max()) // rounding) * rounding
        self.full = len(rows) == sequences * self.widest
        self.starts = counts.cumsum(0) - counts
        number = torch.arange(len(rows), device=rows.device) - self.starts[sequence]
        self.slot = sequence * self.widest + number

    def pack(self, x: torch.Tensor, padding: float = 0) -> torch.Tensor:
        """(n, ...) to (B, widest, ...)."""
        if not self.full:
            x = x.new_full((self.sequences * self.widest, *x.shape[1:]), padding).index_copy(0, self.slot, x)
        return x.unflatten(0, (self.sequences, self.widest))

    def grid(self, x: torch.Tensor) -> torch.Tensor:
        """(n, h, c) to (B, h, widest, c)."""
        return self.pack(x).transpose(1, 2)

    def rows_of(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, h, widest, c) to (n, h, c)."""
        return self.unpack(grid.transpose(1, 2))

    def unpack(self, grid: torch.Tensor) -> torch.Tensor:
        """(B, widest, ...) to (n, ...)."""
        flat = grid.flatten(0, 1)
        return flat if self.full else flat.index_select(0, self.slot)


def _rounding(q: torch.Tensor) -> int:
    return ROUNDED_TO if q.device.type == "cpu" and q.element_size() == 2 else 1


def _by_triton(q: torch.Tensor) -> bool:
    return gpu.has_kernels(q.device) and triton_attention.supports(q)


def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    at: torch.Tensor,
    since: torch.Tensor | None,
    counts: torch.Tensor | None,
    dropout: KeyedDropout | None,
    first_head: int,
    scale: float | None,
) -> torch.Tensor:
    """Of queries (B, h, S, c) at positions ``at`` and ``since`` (B, S); ``counts`` (B,) of them are valid, or all."""
    mask = None
    if dropout is not None and dropout.probability > 0:
        mask = triton_attention.Mask.of(dropout, len(q), first_head, q.shape[1], k.shape[2])
    if counts is None:
        counts = torch.full((len(q),), q.shape[2], device=q.device)
    return triton_attention.attend(q, k, v, at, counts, scale, mask, since)


def _by_position(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing | None,
    at: torch.Tensor,
    since: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Queries (n, h, c) that ``packing`` packs, or (B, h, S, c) without it, at positions ``at`` (B, S), ascending but
    for padding; in chunks, each with the keys that it can see. Returns what ``q`` is."""
    chunks = _chunks(at, since, k.shape[2])
    if q.device.type == "cpu":
        return _ByPosition.apply(q, k, v, packing, at, since, chunks, scale)
    grid = q if packing is None else packing.grid(q)
    outputs = [
        F.scaled_dot_product_attention(
            chunk.of(grid), chunk.seen(k), chunk.seen(v), attn_mask=chunk.mask(at, since, q.dtype), scale=scale
        )
        for chunk in chunks
    ]
    mixed = torch.cat(outputs, 2)
    return mixed if packing is None else packing.rows_of(mixed)


class _Chunk(NamedTuple):
    """Queries whose products are made at once; they see keys from ``first`` to ``end - 1`` alone."""

    queries: slice
    first: int
    end: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Their part of (B, h, S, c)."""
        return x[:, :, self.queries]

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """What they see of (B, h, T, c)."""
        return x[:, :, self.first : self.end]

    def mask(self, at: torch.Tensor, since: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """What is added to products (B, 1, s, t): -inf where a key is hidden. Padding sees all where it saw none."""
        key = torch.arange(self.first, self.end, device=at.device)
        hidden = key > at[:, None, self.queries, None]
        if since is not None:
            hidden |= key < since[:, None, self.queries, None]
            hidden &= ~hidden.all(-1, keepdim=True)
        return torch.zeros(hidden.shape, dtype=dtype, device=at.device).masked_fill_(hidden, -torch.inf)


def _chunks(at: torch.Tensor, since: torch.Tensor | None, keys: int) -> list[_Chunk]:
    """Of queries at positions ``at`` (B, S) and ``since``: about ``QUERY_CHUNK`` each, all of one size but the last."""
    queries = at.shape[1]
    size = -(-queries // max(1, round(queries / QUERY_CHUNK)))
    size = -(-size // ROUNDED_TO) * ROUNDED_TO if QUERY_CHUNK >= ROUNDED_TO else QUERY_CHUNK
    ends = [part.max() + 1 for part in at.split(size, 1)]
    firsts = [part.min() for part in since.split(size, 1)] if since is not None else [torch.zeros_like(e) for e in ends]
    bounds = torch.stack([torch.stack(firsts), torch.stack(ends)], 1).tolist()  # one copy from the device
    return [
        _Chunk(
            slice(i * size, (i + 1) * size),
            first // ROUNDED_TO * ROUNDED_TO,
            min(keys, -(-end // ROUNDED_TO) * ROUNDED_TO),
        )
        for i, (first, end) in enumerate(bounds)
    ]


class _ByPosition(torch.autograd.Function):
    """On a CPU. What is kept are rows, not their padded grids, and no mask: a mask has (S, T) numbers."""

    @staticmethod
    def forward(ctx, q, k, v, packing, at, since, chunks, scale):
        grid = q if packing is None else packing.grid(q)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outputs, sums = zip(
            *(
                flash(
                    *(chunk.of(grid), chunk.seen(k), chunk.seen(v), 0.0, False),
                    attn_mask=chunk.mask(at, since, q.dtype),
                    scale=scale,
                )
                for chunk in chunks
            ),
            strict=True,
        )
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
        mixed = mixed if packing is None else packing.rows_of(mixed)
        ctx.save_for_backward(q, k, v, at, since, mixed, *sums)
        ctx.packing, ctx.chunks, ctx.scale = packing, chunks, scale
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, at, since, mixed, *sums = ctx.saved_tensors
        packing = ctx.packing
        dtype = q.dtype
        if packing is not None:
            q, mixed, gradient = (packing.grid(x) for x in (q, mixed, gradient))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

        def of_chunk(chunk: _Chunk, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return flash(
                *(chunk.of(gradient), chunk.of(q), chunk.seen(k), chunk.seen(v), chunk.of(mixed), scales, 0.0, False),
                attn_mask=chunk.mask(at, since, dtype),
                scale=ctx.scale,
            )

        if len(sums) == 1 and ctx.chunks[0][1:] == (0, k.shape[2]):
            of_q, of_k, of_v = of_chunk(ctx.chunks[0], sums[0])
        else:
            wide = dtype if dtype == torch.float64 else torch.float32
            of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
            for chunk, scales in zip(ctx.chunks, sums, strict=True):
                parts = of_chunk(chunk, scales)
                chunk.of(of_q).copy_(parts[0])
                chunk.seen(of_k).add_(parts[1])
                chunk.seen(of_v).add_(parts[2])
        of_q = of_q if packing is None else packing.rows_of(of_q)
        return of_q, of_k.to(dtype), of_v.to(dtype), *[None] * 5
