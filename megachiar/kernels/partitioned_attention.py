"""Attention of the attention rows of a partition, whose number stands on the device alone.

Queries are in operator order, and so are keys and values where they belong to the attention rows alone. Rows that take
DCT mixing are neither read nor written, in a gradient too: they are whatever was there (NaN on a CPU).

Shapes: B = sequences, T = tokens of a sequence, N = B * T rows, h = heads, c = channels of a head.
"""

from __future__ import annotations

import math

import torch

from megachiar.kernels import gpu, triton_attention
from megachiar.kernels.dropout import Dropper, KeyedDropout, head_keys
from megachiar.kernels.operation import operation
from megachiar.kernels.partition import Partition

Tensor = torch.Tensor


@operation("megachiar::attend_by_partition")
def attend(
    heads: Tensor,
    kv: Tensor | None,
    routes: Tensor,
    order: Tensor,
    before: Tensor,
    starts: Tensor,
    document_firsts: Tensor | None,
    document_ends: Tensor | None,
    keys: Tensor | None,
    probability: float,
    site: int,
) -> tuple[Tensor, Tensor]:
    """Compute attention of the attention rows to the keys of their document up to their own position.

    Args:
        heads: queries (N, 1, h, c) in operator order, or with ``kv`` None queries, keys and values (N, 3, h, c), all in
            operator order: attention rows then see no other rows.
        kv: keys and values (N, 2, h, c) of all rows, in the rows' first order; None where ``heads`` has them.
        routes, order, before, starts: a partition of the rows.
        document_firsts: (N,) int32, the first row of each row's document; None where each sequence is one document.
        document_ends: (N,) int32, the row behind the last one of each row's document; None as ``document_firsts``.
        keys: (N,) int64, the dropout keys of the rows in their first order; None for no dropout.
        probability: probability of dropout.
        site: number of the sub-layer in the model, for dropout.

    Returns:
        (N, h, c) in operator order, and (N, h) for the backward pass.
    """
    by = Partition(routes, order, before, starts)
    if _by_triton(heads):
        layout = _row_layout(by, kv is None, document_firsts, None)
        mask = _mask(heads, keys, by, probability, site)
        q, k, v = _parts(heads, kv)
        return triton_attention.forward(q, k, v, layout, _scale(heads), mask)
    weights, factors, _, v = _probabilities(heads, kv, by, document_firsts, keys, probability, site)
    mixed = ((weights * factors) @ v).to(heads.dtype)
    sums = heads.new_empty(len(heads), heads.shape[2], dtype=torch.float32)
    return _in_operator_order(mixed, by), sums


@attend.register_fake
def _(heads, kv, *_):
    n, _, h, c = heads.shape
    return heads.new_empty(n, h, c), heads.new_empty(n, h, dtype=torch.float32)


@operation("megachiar::attend_by_partition_backward")
def attend_backward(
    gradient: Tensor,
    output: Tensor,
    sums: Tensor,
    heads: Tensor,
    kv: Tensor | None,
    routes: Tensor,
    order: Tensor,
    before: Tensor,
    starts: Tensor,
    document_firsts: Tensor | None,
    document_ends: Tensor | None,
    keys: Tensor | None,
    probability: float,
    site: int,
) -> list[Tensor]:
    """Return the gradients of ``heads`` and, unless it is None, of ``kv``, in their shapes.

    Args:
        gradient: (N, h, c), the gradient of the result; its DCT rows are not read.
        output, sums: what ``attend`` returned.
        heads, kv, routes, order, before, starts, document_firsts, document_ends, keys, probability, site: what it took.
    """
    by = Partition(routes, order, before, starts)
    of_heads, of_kv = torch.empty_like(heads), None if kv is None else torch.empty_like(kv)
    if _by_triton(heads):
        layout = _row_layout(by, kv is None, document_firsts, document_ends)
        mask = _mask(heads, keys, by, probability, site)
        inputs, gradients = _parts(heads, kv), _parts(of_heads, of_kv)
        triton_attention.backward(gradient, output, sums, inputs, gradients, layout, _scale(heads), mask)
        return [of_heads] if of_kv is None else [of_heads, of_kv]
    weights, factors, q, v = _probabilities(heads, kv, by, document_firsts, keys, probability, site)
    k = _by_head(_parts(heads, kv)[1], by, in_operator_order=kv is None)
    slope = _by_head(gradient, by, in_operator_order=True)
    of_v = (weights * factors).mT @ slope
    of_weights = (slope @ v.mT) * factors
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * _scale(heads)
    of_q, of_k = of_scores @ k, of_scores.mT @ q
    if of_kv is None:
        for i, part in enumerate((of_q, of_k, of_v)):
            of_heads[:, i] = _in_operator_order(part.to(heads.dtype), by)
        return [of_heads]
    of_heads[:, 0] = _in_operator_order(of_q.to(heads.dtype), by)
    of_kv[:, 0], of_kv[:, 1] = (part.transpose(1, 2).flatten(0, 1) for part in (of_k, of_v))
    return [of_heads, of_kv]


@attend_backward.register_fake
def _(gradient, output, sums, heads, kv, *_):
    return [torch.empty_like(x) for x in (heads, kv) if x is not None]


def _by_triton(heads: Tensor) -> bool:
    return gpu.has_kernels(heads.device) and triton_attention.supports(heads)


def _scale(heads: Tensor) -> float:
    return 1 / math.sqrt(heads.shape[-1])


def _parts(heads: Tensor, kv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (N, h, c)."""
    if kv is None:
        return heads[:, 0], heads[:, 1], heads[:, 2]
    return heads[:, 0], kv[:, 0], kv[:, 1]


def _row_layout(
    by: Partition, keys_are_routed: bool, document_firsts: Tensor | None, document_ends: Tensor | None
) -> triton_attention.RowLayout:
    """Return the rows that the Triton kernels work on. Those behind the attention rows are in no sequence.

    The ends of documents are for the backward pass.
    """
    n, sequences = len(by.order), len(by.starts) - 1
    length = n // sequences
    rows = triton_attention.multiples(n, 1, by.order.device)
    first_seen = seen_until = None
    if document_firsts is not None:
        first_seen = document_firsts.index_select(0, by.order)
        first_seen = by.before.index_select(0, first_seen) if keys_are_routed else first_seen
    if document_ends is not None:
        of_keys = document_ends.index_select(0, by.order) if keys_are_routed else document_ends
        seen_until = by.before.index_select(0, of_keys)
    key_starts = by.starts if keys_are_routed else triton_attention.multiples(sequences + 1, length, rows.device)
    return triton_attention.RowLayout(
        query_starts=by.starts,
        key_starts=key_starts,
        last_seen=rows if keys_are_routed else by.order,
        longest_queries=length,
        longest_keys=length,
        first_seen=first_seen,
        seen_from=rows if keys_are_routed else by.before,
        seen_until=seen_until,
    )


def _mask(
    heads: Tensor, keys: Tensor | None, by: Partition, probability: float, site: int
) -> triton_attention.Mask | None:
    """Return the mask of dropout for queries in operator order."""
    if keys is None:
        return None
    n, sequences = len(by.order), len(by.starts) - 1
    dropout = KeyedDropout(probability, keys, site)
    return triton_attention.Mask.of(dropout, 0, heads.shape[-2], n // sequences, rows=by.order)


def _by_head(x: Tensor, by: Partition, in_operator_order: bool) -> Tensor:
    """Return rows (N, h, c) as (B, h, T, c) in the type of sums; DCT rows of those in operator order become 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if in_operator_order:
        wide = torch.where(by.routes.view(-1, 1, 1) > 0, wide.index_select(0, by.places()), 0)
    return wide.unflatten(0, (len(by.starts) - 1, -1)).transpose(1, 2)


def _in_operator_order(x: Tensor, by: Partition) -> Tensor:
    """Return (B, h, T, c) as rows (N, h, c) in operator order, NaN in the DCT rows."""
    rows = x.transpose(1, 2).flatten(0, 1).index_select(0, by.order)
    return torch.where(by.is_attention().view(-1, 1, 1), rows, torch.nan)


def _probabilities(
    heads: Tensor,
    kv: Tensor | None,
    by: Partition,
    document_firsts: Tensor | None,
    keys: Tensor | None,
    probability: float,
    site: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return probabilities and the factors of their dropout (B, h, T, T), queries and values (B, h, T, c), in torch.

    This is the reference of the kernels: each row is a query here, and who asks takes those of the attention rows.
    """
    q, k, v = (_by_head(x, by, in_operator_order=i == 0 or kv is None) for i, x in enumerate(_parts(heads, kv)))
    sequences, _, length, _ = q.shape
    position = torch.arange(length, device=q.device)
    seen = (position <= position[:, None])[None]
    if document_firsts is not None:
        seen = seen & (position >= (document_firsts.view(sequences, length) % length)[..., None])
    if kv is None:  # a row that takes DCT mixing sees itself alone: a sum of nothing would be NaN
        seen = seen & (by.routes.view(sequences, 1, length) > 0) | torch.eye(length, dtype=torch.bool, device=q.device)
    scores = (q @ k.mT * _scale(heads)).masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1), _dropout_factors(q, kv is None, by, keys, probability, site), q, v


def _dropout_factors(
    q: Tensor, keys_are_routed: bool, by: Partition, keys: Tensor | None, probability: float, site: int
) -> Tensor:
    """Return what dropout multiplies the probabilities (B, h, T, T) of queries (B, h, T, c) with.

    The column of a key is its position, or where only attention rows are keys its number among those of its sequence.
    """
    sequences, h, length, _ = q.shape
    if keys is None:
        return q.new_ones(())
    of_heads = head_keys(keys.view(sequences, length), 0, h).transpose(1, 2)
    drop = Dropper(KeyedDropout(probability, of_heads, site), length)
    ones = q.new_ones(sequences * h * length, length)
    factors = drop(ones, drop.keys.flatten(), torch.empty_like(ones)).view(sequences, h, length, length)
    if not keys_are_routed:
        return factors
    column = (by.before[:-1].view(sequences, length) - by.starts[:-1, None]).long()
    return factors.gather(-1, column[:, None, None, :].expand_as(factors))
