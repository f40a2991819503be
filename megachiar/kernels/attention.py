"""Causal attention of all tokens or of the routed ones alone, and the one choice of the backend that computes it.

    causal_attention        the newest S positions of each sequence attend to all its keys
    routed_attention        the routed rows attend to all keys of their sequence
    routed_self_attention   the routed rows attend to the routed rows of their sequence

    backend       file                  for
    SDPA          torch                 causal attention without dropout and documents: flash or cuDNN on a GPU
    TRITON        triton_attention      everything else on a GPU, where the kernels take the type and the head
    CPU           cpu_attention         everything else on a CPU, without dropout
    DROPOUT       dropout_attention     dropout of probabilities without Triton
    MASKED_SDPA   masked_sdpa           what is left: the reference of the others

Shapes: B = sequences, T = keys of a sequence, S = queries of a sequence, n = routed rows, h = heads, c = channels of a
head. Where nothing is routed, the queries are the newest S of the T positions.
"""

from __future__ import annotations

from enum import Enum, auto

import torch
import torch.nn.functional as F

from megachiar.kernels import cpu_attention, gpu, triton_attention
from megachiar.kernels.attention_options import AttentionOptions
from megachiar.kernels.dropout_attention import dropout_attention
from megachiar.kernels.masked_sdpa import masked_sdpa
from megachiar.kernels.routed_rows import Packing, RoutedRows

ROUTED_KEYS_BY_TRITON = 2048
"""The most tokens of a sequence whose routed rows attend to each other by the Triton kernel, which needs no packing.
Rows of longer sequences are packed for torch's kernel, whose backward pass is 1.5 times as fast at length (427 against
285 TFLOP/s on an H200). The limit was set by these rates; the two ways were not timed side by side."""

PLAIN = AttentionOptions()


class Backend(Enum):
    """Who computes an attention product."""

    SDPA = auto()
    TRITON = auto()
    CPU = auto()
    DROPOUT = auto()
    MASKED_SDPA = auto()


def choose_backend(
    q: torch.Tensor, options: AttentionOptions, rows: RoutedRows | None = None, keys_are_routed: bool = False
) -> Backend:
    """Choose the backend of an attention product; nothing else decides this.

    Args:
        q: queries (..., c); the choice depends on their device, type and c.
        options: of the product.
        rows: the routed rows whose queries these are; None for all rows.
        keys_are_routed: whether the keys belong to the routed rows alone.
    """
    plain = not options.drops and options.document_starts is None
    if plain and rows is None:
        return Backend.SDPA
    too_long = rows is not None and keys_are_routed and plain and rows.length > ROUTED_KEYS_BY_TRITON
    if not too_long and gpu.has_kernels(q.device) and triton_attention.supports(q):
        return Backend.TRITON
    if options.drops:
        return Backend.DROPOUT
    if q.device.type == "cpu":
        return Backend.CPU
    return Backend.SDPA if plain and keys_are_routed else Backend.MASKED_SDPA


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions = PLAIN
) -> torch.Tensor:
    """Compute attention of the newest S positions to all keys up to their own.

    Args:
        q: (B, h, S, c).
        k, v: (B, h, T, c) with T >= S.
        options: with dropout keys (B * S,) and document starts (B, S).

    Returns:
        (B, h, S, c).
    """
    backend = choose_backend(q, options)
    if backend is Backend.SDPA:
        return _causal_sdpa(q, k, v, options.scale)
    sequences, _, queries, _ = q.shape
    if backend is Backend.TRITON:
        is_ready = options.document_starts is None or options.document_rows is not None
        if queries == k.shape[2] and is_ready:
            mixed = _all_by_triton(q, k, v, options)
        else:
            rows = RoutedRows(torch.arange(sequences * queries, device=q.device), sequences, queries)
            mixed = _routed_by_triton(_as_rows(q), k, v, rows, _with_flat_starts(options))
        return mixed.unflatten(0, (sequences, queries)).transpose(1, 2)
    positions = torch.arange(k.shape[2] - queries, k.shape[2]).expand(sequences, -1)
    if backend is Backend.DROPOUT:
        return dropout_attention(q, k, v, positions, options)
    if backend is Backend.MASKED_SDPA:
        return masked_sdpa(q, k, v, positions.to(q.device), options.document_starts, options.scale)
    spans = cpu_attention.QuerySpans(
        query_starts=list(range(0, sequences * queries + 1, queries)),
        last_seen=positions.flatten(),
        first_seen=_with_flat_starts(options).document_starts,
    )
    mixed = cpu_attention.attend(_as_rows(q), k, v, spans, options.scale)
    return mixed.unflatten(0, (sequences, queries)).transpose(1, 2)


def routed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: RoutedRows, options: AttentionOptions = PLAIN
) -> torch.Tensor:
    """Compute attention of the routed rows alone to all keys of their sequence up to their own position.

    Args:
        q: (n, h, c), queries of the routed rows.
        k, v: (B, h, T, c) with T >= S.
        rows: which of the B * S rows are routed.
        options: with dropout keys (n,) and document starts (n,).

    Returns:
        (n, h, c), in the order of ``rows``. No (S, T) tensor is kept for rows that are not routed.
    """
    if len(rows.indices) == 0:  # keys and values get a gradient of zeros, for ranks reduce alike
        return q + (k[:, :, :0].sum() + v[:, :, :0].sum())
    if rows.are_all:
        by_sequence = rows.sequences, rows.length
        if options.document_starts is not None:
            options = options._replace(document_starts=options.document_starts.view(by_sequence))
        return _as_rows(causal_attention(q.unflatten(0, by_sequence).transpose(1, 2), k, v, options))
    backend = choose_backend(q, options, rows)
    if backend is Backend.TRITON:
        return _routed_by_triton(q, k, v, rows, options)
    positions = rows.position + (k.shape[2] - rows.length)
    if backend is Backend.CPU:
        spans = cpu_attention.QuerySpans(
            query_starts=rows.starts(), last_seen=positions, first_seen=options.document_starts
        )
        return cpu_attention.attend(q, k, v, spans, options.scale)
    packing = Packing(rows)
    packed, positions = packing.pack_heads(q), packing.pack(positions)
    if options.document_starts is not None:
        options = options._replace(document_starts=packing.pack(options.document_starts))
    if backend is Backend.DROPOUT:
        mixed = dropout_attention(packed, k, v, positions, _with_packed_dropout(options, packing))
    else:
        mixed = masked_sdpa(packed, k, v, positions, options.document_starts, options.scale)
    return packing.unpack_heads(mixed)


def routed_self_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: RoutedRows, options: AttentionOptions = PLAIN
) -> torch.Tensor:
    """Compute attention of the routed rows to the routed rows of their sequence up to themselves, and to no other.

    Args:
        q, k, v: (n, h, c), of the routed rows.
        rows: which of the B * S rows are routed.
        options: with dropout keys (n,) and document starts (n,).

    Returns:
        (n, h, c), in the order of ``rows``.
    """
    indices = rows.indices
    if len(indices) == 0:
        return q + k + v  # keys and values get a gradient of zeros, for ranks reduce alike
    # Routed rows of a sequence lie side by side: to each other this is causal attention. ``first_seen`` counts routed
    # rows: it is the number of the first one in each row's document.
    first_seen = None
    if options.document_starts is not None:
        first_seen = torch.searchsorted(indices, indices - rows.position + options.document_starts)
    backend = choose_backend(q, options, rows, keys_are_routed=True)
    if backend is Backend.TRITON:
        starts = triton_attention.first_rows(indices.int(), rows.sequences, rows.length)
        row_layout = triton_attention.RowLayout(
            query_starts=starts,
            key_starts=starts,
            last_seen=torch.arange(len(indices), dtype=torch.int32, device=indices.device),
            longest_queries=rows.length,
            longest_keys=rows.length,
            first_seen=first_seen.int() if first_seen is not None else None,
        )
        return _by_triton(q, k, v, row_layout, options)
    if backend is Backend.CPU:
        starts_on_host = rows.starts()
        before = torch.tensor(starts_on_host).index_select(0, rows.sequence)
        spans = cpu_attention.QuerySpans(
            query_starts=starts_on_host,
            last_seen=torch.arange(len(indices)) - before,
            first_seen=first_seen - before if first_seen is not None else None,
            key_starts=starts_on_host,
        )
        return cpu_attention.attend(q, k, v, spans, options.scale)
    packing = Packing(rows)
    options = _with_packed_dropout(options, packing)
    if first_seen is not None:
        # Padding comes after the rows, and sees no earlier key than the last of them: the bounds ascend.
        packed_starts = packing.pack(first_seen - packing.starts.index_select(0, rows.sequence)).cummax(1).values
        options = options._replace(document_starts=packed_starts)
    q, k, v = (packing.pack_heads(x) for x in (q, k, v))
    return packing.unpack_heads(causal_attention(q, k, v, options))


def _causal_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Compute ``causal_attention`` without dropout and documents."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:  # the newest position sees every key
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    positions = torch.arange(keys, device=q.device)
    mask = positions <= positions[keys - queries :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _all_by_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: AttentionOptions) -> torch.Tensor:
    """Compute ``causal_attention`` of all positions by the Triton kernels, as rows (B * T, h, c)."""
    sequences, _, length, _ = q.shape
    rows = triton_attention.multiples(sequences * length, 1, q.device)
    starts = triton_attention.multiples(sequences + 1, length, q.device)
    row_layout = triton_attention.RowLayout(
        query_starts=starts,
        key_starts=starts,
        last_seen=rows,
        longest_queries=length,
        longest_keys=length,
        first_seen=options.document_rows.firsts if options.document_rows is not None else None,
        seen_from=rows,
        seen_until=options.document_rows.ends if options.document_rows is not None else None,
    )
    return _by_triton(_as_rows(q), _as_rows(k), _as_rows(v), row_layout, options)


def _routed_by_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: RoutedRows, options: AttentionOptions
) -> torch.Tensor:
    """Compute ``routed_attention`` by the Triton kernels, which read keys and values without copying them."""
    keys, queries = k.shape[2], rows.length
    indices = rows.indices.int()
    last_seen, first_seen = indices, options.document_starts
    if queries != keys or first_seen is not None:
        first_key = indices // queries * keys
        last_seen = indices % queries + (first_key + (keys - queries))
        first_seen = first_seen + first_key if first_seen is not None else None
    row_layout = triton_attention.RowLayout(
        query_starts=triton_attention.first_rows(indices, rows.sequences, queries),
        key_starts=triton_attention.multiples(rows.sequences + 1, keys, q.device),
        last_seen=last_seen,
        longest_queries=queries,
        longest_keys=keys,
        first_seen=first_seen.int() if first_seen is not None else None,
    )
    return _by_triton(q, _as_rows(k), _as_rows(v), row_layout, options)


def _by_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_layout: triton_attention.RowLayout,
    options: AttentionOptions,
) -> torch.Tensor:
    """Compute (n, h, c) from queries (n, h, c) and keys and values (m, h, c) that are stored as rows."""
    mask = None
    if options.dropout is not None and options.drops:
        mask = triton_attention.Mask.of(options.dropout, options.first_head, q.shape[1], row_layout.longest_keys)
    return triton_attention.attend(q, k, v, row_layout, options.scale, mask)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """Turn (B, h, S, c) into rows (B * S, h, c)."""
    return x.transpose(1, 2).flatten(0, 1)


def _with_flat_starts(options: AttentionOptions) -> AttentionOptions:
    """Turn document starts (B, S) into (B * S,)."""
    if options.document_starts is None:
        return options
    return options._replace(document_starts=options.document_starts.flatten())


def _with_packed_dropout(options: AttentionOptions, packing: Packing) -> AttentionOptions:
    """Turn dropout keys (n,) of routed rows into (B * widest,)."""
    if options.dropout is None:
        return options
    keys = packing.pack(options.dropout.keys).flatten()
    return options._replace(dropout=options.dropout._replace(keys=keys))
