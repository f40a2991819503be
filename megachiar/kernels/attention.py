"""Causal attention for all tokens, or for the routed ones alone.

Shapes: B = sequences, T = keys of a sequence, S = queries of a sequence (the newest S of the T positions when nothing
is routed), n = routed rows, h = heads, c = channels of a head.

``document_starts`` are positions at which each query's document begins: it sees no key before. Without them a sequence
is one document.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megachiar.kernels import cpu_attention, gpu, triton_attention
from megachiar.kernels.dropout import KeyedDropout
from megachiar.kernels.dropout_attention import dropout_attention

QUERY_CHUNK = 256
"""Queries of a sequence that share one masked product: each chunk sees only the keys up to its last position."""
ROUTED_KEYS_BY_TRITON = 2048
"""Tokens of a sequence up to which routed rows that attend to each other go to the Triton kernel, which reads them as
they lie. Those of longer sequences are packed for torch's kernel, whose backward pass is 1.5 times as fast at length
(427 against 285 TFLOP/s on an H200). The limit was set by these rates; the two ways were not timed side by side."""


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: KeyedDropout | None = None,
    first_head: int = 0,
    scale: float | None = None,
    document_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of the newest S positions to all keys up to their own.

    Args:
        q: (B, h, S, c).
        k, v: (B, h, T, c) with T >= S.
        dropout: of attention probabilities, with the keys (B * S,) of the queries' rows.
        first_head: number of the first head of q, where ranks share the heads.
        scale: of the products; 1 / sqrt(c) if not given.
        document_starts: (B, S) positions.

    Returns:
        (B, h, S, c).
    """
    queries, keys = q.shape[2], k.shape[2]
    dropped = dropout is not None and dropout.probability > 0
    if dropped or document_starts is not None:
        if _by_triton(q):
            rows = torch.arange(len(q) * queries, device=q.device)
            document_starts = document_starts.flatten() if document_starts is not None else None
            mixed = _routed_by_triton(
                q.transpose(1, 2).flatten(0, 1), k, v, rows, queries, dropout, first_head, scale, document_starts
            )
            return mixed.unflatten(0, (len(q), queries)).transpose(1, 2)
        at = torch.arange(keys - queries, keys).expand(len(q), -1)
        if dropped:
            return dropout_attention(q, k, v, at, dropout, first_head, scale, document_starts)
        if q.device.type != "cpu":
            return masked_sdpa(q, k, v, at.to(q.device), document_starts, scale)
        starts = range(0, len(q) * queries + 1, queries)
        rows = q.transpose(1, 2).flatten(0, 1)
        spans = cpu_attention.QuerySpans(starts, at.flatten(), document_starts.flatten())
        return cpu_attention.attend(rows, k, v, spans, scale).unflatten(0, (len(q), queries)).transpose(1, 2)
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
    document_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of routed rows alone to all keys of their sequence up to their own position.

    Args:
        q: (n, h, c), queries of the routed rows.
        k, v: (B, h, T, c).
        rows: (n,) int64, ascending: which of the B * queries rows (sequence by sequence) were routed.
        queries: S, rows a sequence has. They stand at the newest S of its T positions.
        dropout: of attention probabilities, with the keys (n,) of the routed rows.
        first_head: number of the first head of q, where ranks share the heads.
        scale: of the products; 1 / sqrt(c) if not given.
        document_starts: (n,) positions.

    Returns:
        (n, h, c), in the order of ``rows``. No (S, T) tensor is kept for rows that were not routed.
    """
    if len(rows) == 0:  # keys and values get a gradient of zeros, for ranks reduce alike
        return q + (k[:, :, :0].sum() + v[:, :, :0].sum())
    sequences, keys = k.shape[0], k.shape[2]
    if len(rows) == sequences * queries:
        packed = q.unflatten(0, (sequences, queries)).transpose(1, 2)
        document_starts = document_starts.view(sequences, queries) if document_starts is not None else None
        return causal_attention(packed, k, v, dropout, first_head, scale, document_starts).transpose(1, 2).flatten(0, 1)
    if _by_triton(q):
        return _routed_by_triton(q, k, v, rows, queries, dropout, first_head, scale, document_starts)
    at = rows % queries + (keys - queries)
    dropped = dropout is not None and dropout.probability > 0
    if q.device.type == "cpu" and not dropped:
        spans = cpu_attention.QuerySpans(_starts(rows, sequences, queries), at, document_starts)
        return cpu_attention.attend(q, k, v, spans, scale)
    packing = Packing(rows, sequences, queries)
    packed, at = packing.pack_heads(q), packing.pack(at)
    document_starts = packing.pack(document_starts) if document_starts is not None else None
    if dropped:
        dropout = dropout._replace(keys=packing.pack(dropout.keys).flatten())
    if dropped:
        mixed = dropout_attention(packed, k, v, at, dropout, first_head, scale, document_starts)
    else:
        mixed = masked_sdpa(packed, k, v, at, document_starts, scale)
    return packing.unpack_heads(mixed)


def routed_self_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    sequences: int,
    queries: int,
    dropout: KeyedDropout | None = None,
    first_head: int = 0,
    scale: float | None = None,
    document_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of routed rows to the routed rows of their sequence up to themselves: to no other.

    Args:
        q, k, v: (n, h, c), of the routed rows.
        rows: (n,) int64, ascending: which of the B * S rows (sequence by sequence) were routed.
        sequences, queries: B and S.
        dropout: of attention probabilities, with the keys (n,) of the routed rows.
        first_head: number of the first head of q, where ranks share the heads.
        scale: of the products; 1 / sqrt(c) if not given.
        document_starts: (n,) positions.

    Returns:
        (n, h, c), in the order of ``rows``.
    """
    if len(rows) == 0:
        return q + k + v  # keys and values get a gradient of zeros, for ranks reduce alike
    # The routed rows of a sequence lie side by side: among them it is causal attention. Padding comes after them all.
    if document_starts is not None:  # of the first routed row of the document, its number among the rows
        document_starts = torch.searchsorted(rows, rows - rows % queries + document_starts)
    dropped = dropout is not None and dropout.probability > 0
    if _by_triton(q) and (dropped or document_starts is not None or queries <= ROUTED_KEYS_BY_TRITON):
        starts = triton_attention.first_rows(rows.int(), sequences, queries)
        last_seen = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        document_starts = document_starts.int() if document_starts is not None else None
        row_layout = triton_attention.RowLayout(starts, starts, last_seen, queries, queries, document_starts)
        return _by_rows(q, k, v, row_layout, dropout, first_head, scale)
    if q.device.type == "cpu" and not dropped:
        starts = _starts(rows, sequences, queries)
        before = torch.tensor(starts).index_select(0, rows // queries)
        at, document_starts = (
            torch.arange(len(rows)) - before,
            document_starts - before if document_starts is not None else None,
        )
        return cpu_attention.attend(q, k, v, cpu_attention.QuerySpans(starts, at, document_starts, starts), scale)
    packing = Packing(rows, sequences, queries)
    if dropout is not None:
        dropout = dropout._replace(keys=packing.pack(dropout.keys).flatten())
    if document_starts is not None:
        document_starts = (
            packing.pack(document_starts - packing.starts.index_select(0, rows // queries)).cummax(1).values
        )
    return packing.unpack_heads(
        causal_attention(*map(packing.pack_heads, (q, k, v)), dropout, first_head, scale, document_starts)
    )


def cached_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor, keys_at: torch.Tensor
) -> torch.Tensor:
    """Attention of queries (B, h, S, c) at positions ``at`` (B, S) to keys (B, h, T, c) at positions ``keys_at`` (B, T)
    up to their own; a query that sees none gets the mean of the values."""
    mask = keys_at[:, None, None, :] <= at[:, None, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~mask.any(-1, keepdim=True))


class Packing:
    """Routed rows of each sequence side by side, in a (B, widest) grid whose rest is padding.

    Args:
        rows: (n,) int64, ascending, at least one: which of the B * S rows (sequence by sequence) were routed.
        sequences, queries: B and S.

    Attributes:
        counts: (B,) routed rows of each sequence.
        starts: (B,) of them before each sequence.
    """

    def __init__(self, rows: torch.Tensor, sequences: int, queries: int):
        sequence = rows // queries
        self.counts = counts = torch.bincount(sequence, minlength=sequences)
        self.sequences, self.widest = sequences, int(counts.max())
        self.full = len(rows) == sequences * self.widest
        self.starts = counts.cumsum(0) - counts
        number = torch.arange(len(rows), device=rows.device) - self.starts[sequence]
        self.slot = sequence * self.widest + number

    def pack(self, x: torch.Tensor, padding: float = 0) -> torch.Tensor:
        """(n, ...) to (B, widest, ...)."""
        if not self.full:
            x = x.new_full((self.sequences * self.widest, *x.shape[1:]), padding).index_copy(0, self.slot, x)
        return x.unflatten(0, (self.sequences, self.widest))

    def pack_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(n, h, c) to (B, h, widest, c)."""
        return self.pack(x).transpose(1, 2)

    def unpack_heads(self, packed: torch.Tensor) -> torch.Tensor:
        """(B, h, widest, c) to (n, h, c)."""
        return self.unpack(packed.transpose(1, 2))

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """(B, widest, ...) to (n, ...)."""
        flat = packed.flatten(0, 1)
        return flat if self.full else flat.index_select(0, self.slot)


def _starts(rows: torch.Tensor, sequences: int, queries: int) -> list[int]:
    """Number among the routed rows of the first one of each sequence, and how many there are."""
    return torch.searchsorted(rows, torch.arange(sequences + 1) * queries).tolist()


def _by_triton(q: torch.Tensor) -> bool:
    return gpu.has_kernels(q.device) and triton_attention.supports(q)


def _routed_by_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    queries: int,
    dropout: KeyedDropout | None,
    first_head: int,
    scale: float | None,
    document_starts: torch.Tensor | None,
) -> torch.Tensor:
    """Arguments and result as those of ``routed_attention``; keys and values are read as they lie."""
    sequences, keys = k.shape[0], k.shape[2]
    rows = rows.int()
    last_seen = rows
    if queries != keys or document_starts is not None:
        first_key = rows // queries * keys
        last_seen = rows % queries + (first_key + (keys - queries))
        document_starts = document_starts + first_key if document_starts is not None else None
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    row_layout = triton_attention.RowLayout(
        triton_attention.first_rows(rows, sequences, queries),
        triton_attention.multiples(sequences + 1, keys, q.device),
        last_seen,
        queries,
        keys,
        document_starts.int() if document_starts is not None else None,
    )
    return _by_rows(q, k, v, row_layout, dropout, first_head, scale)


def _by_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_layout: triton_attention.RowLayout,
    dropout: KeyedDropout | None,
    first_head: int,
    scale: float | None,
) -> torch.Tensor:
    """(n, h, c) of queries (n, h, c), keys and values (m, h, c)."""
    mask = None
    if dropout is not None and dropout.probability > 0:
        mask = triton_attention.Mask.of(dropout, first_head, q.shape[1], row_layout.longest_keys)
    return triton_attention.attend(q, k, v, row_layout, scale, mask)


def masked_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    at: torch.Tensor,
    document_starts: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """On any device by ``scaled_dot_product_attention``: queries (B, h, S, c) at positions ``at`` (B, S), ascending but
    for padding, see keys ``document_starts`` (B, S) to ``at``; in chunks, each with a mask over the keys that it can
    see.

    Returns:
        (B, h, S, c).
    """
    ats = at.split(QUERY_CHUNK, 1)
    if document_starts is None:
        starts = [torch.zeros_like(part) for part in ats]
    else:
        starts = document_starts.split(QUERY_CHUNK, 1)
    bounds = torch.stack([torch.stack([s.min(), a.max() + 1]) for s, a in zip(starts, ats, strict=True)])
    outputs = []
    for queries, of_at, of_start, (first, end) in zip(
        q.split(QUERY_CHUNK, 2), ats, starts, bounds.tolist(), strict=True
    ):  # one copy to the host
        key = torch.arange(first, end, device=q.device)
        seen = (key <= of_at[:, None, :, None]) & (key >= of_start[:, None, :, None])
        seen |= ~seen.any(-1, keepdim=True)  # padding
        outputs.append(
            F.scaled_dot_product_attention(queries, k[:, :, first:end], v[:, :, first:end], attn_mask=seen, scale=scale)
        )
    return torch.cat(outputs, 2)
