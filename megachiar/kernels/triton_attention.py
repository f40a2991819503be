"""Routed causal attention in Triton: both passes skip blocks of keys that no query of a block can see.

Queries and keys are read row by row without copies, and results are written alike: nothing is packed. The kernels read
on the device how many rows a sequence has, so that the host waits for nothing. Neither pass keeps a (n, T) tensor: the
backward pass computes probabilities and dropout masks again. The keys of a mask are those of the row, the head and the
position of the key (see ``dropout``).

    keys      [0 ......... b)[b ............. c)[c ....... end)      of a block of queries
    masked     with documents        no             yes

Shapes: n = rows of queries, m = rows of keys, B = sequences, h = heads, c = channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megachiar.kernels import triton_dropout
from megachiar.kernels.dropout import FACTOR, KeyedDropout, column_keys, least_kept
from megachiar.kernels.gpu import INTERPRETED, compute_type, jit, launch_options, product_precision, tl, triton
from megachiar.kernels.tables import cached_table

HEAD_SIZES = (16, 32, 64, 128)
"""The numbers of channels of a head that the kernels take."""
LOG2_E = 1.4426950408889634
"""log2 e: the kernels take powers of 2."""


class Tiles(NamedTuple):
    """The block sizes of a kernel, and the options that it is compiled with."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiles(kernel: str, c: int, dtype: torch.dtype) -> Tiles:
    """Return the block sizes of a kernel: ``forward``, or ``queries`` or ``keys`` for the kernel of their gradients.

    They compile for sm_90 without spilled registers, which ``tests/kernels/test_triton.py`` checks. Those of 16-bit
    types were the fastest that were tried on an H200.
    """
    if INTERPRETED:
        return Tiles(16, 16, 4, 1)
    wide = c > 64
    if dtype == torch.float32:
        if kernel == "queries":
            return Tiles(16, 32, 4, 1)
        if wide:
            return Tiles(16, 32 if kernel == "forward" else 16, 4, 1)
        return Tiles(32, 32, 4, 1)
    if kernel == "keys":
        return Tiles(32, 128, 8, 2) if wide else Tiles(64, 64, 4, 2)
    if wide:
        return Tiles(128, 64, 8, 3 if kernel == "forward" else 2)
    return Tiles(64, 64, 4, 3)


class RowLayout(NamedTuple):
    """The rows of queries and keys of each sequence, and the keys that each query sees.

    Attributes:
        query_starts: (B + 1,) int32, the first row of queries of each sequence, and n.
        key_starts: (B + 1,) int32, the first row of keys of each sequence, and m.
        last_seen: (n,) int32, ascending, the last row of keys that each query sees.
        longest_queries, longest_keys: no sequence has more queries, or more keys.
        first_seen: (n,) int32, never falling, the first row of keys that each query sees, at most ``last_seen``. None
            where that is the first one of its sequence.
        seen_from: (m,) int32, the first row of queries whose ``last_seen`` is each row of keys or a later one, as if
            all queries were of one sequence. None where the backward pass is to look for it.
        seen_until: (m,) int32, the first row of queries whose ``first_seen`` is behind each row of keys. None as
            ``seen_from``, or where ``first_seen`` is None.

    Rows behind the last one of ``query_starts`` or ``key_starts`` are in no sequence: the kernels neither read nor
    write them.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    last_seen: torch.Tensor
    longest_queries: int
    longest_keys: int
    first_seen: torch.Tensor | None = None
    seen_from: torch.Tensor | None = None
    seen_until: torch.Tensor | None = None


@cached_table
def multiples(count: int, of: int, device: torch.device) -> torch.Tensor:
    """Return (count,) int32: 0, ``of``, 2 ``of``, ..."""
    return torch.arange(0, count * of, of, dtype=torch.int32, device=device)


def first_rows(rows: torch.Tensor, sequences: int, queries: int) -> torch.Tensor:
    """Return ``RowLayout.query_starts`` of routed rows.

    ``rows`` (n,) int32 are their ascending indices among ``sequences`` sequences of ``queries`` rows.
    """
    return torch.searchsorted(rows, multiples(sequences + 1, queries, rows.device), out_int32=True)


class Mask(NamedTuple):
    """The dropout mask of probabilities, as keys.

    Attributes:
        high, low: (n, h) int32, the halves of the dropout keys of the queries' rows and heads, mixed with the site.
        columns: (longest_keys,) int32, the dropout keys of the positions of a sequence's keys.
        least: the smallest int32 number of a probability that stays.
        scale: the factor of those that stay.
    """

    high: torch.Tensor
    low: torch.Tensor
    columns: torch.Tensor
    least: int
    scale: float

    @classmethod
    def of(
        cls, dropout: KeyedDropout, first_head: int, heads: int, columns: int, rows: torch.Tensor | None = None
    ) -> Mask:
        """Make the mask of ``dropout`` for the heads from ``first_head`` on.

        ``rows`` (n,) says which of the keys of ``dropout`` each query has; None if they are in the queries' order.
        """
        high, low = triton_dropout.head_halves(dropout.keys, rows, first_head, heads, dropout.site)
        return cls(high, low, column_keys(0, columns, high.device), least_kept(dropout.probability), dropout.scale)


def supports(q: torch.Tensor) -> bool:
    """Return whether the kernels take queries (..., c) like these."""
    return q.shape[-1] in HEAD_SIZES and q.dtype in (torch.float32, torch.bfloat16, torch.float16)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_layout: RowLayout,
    scale: float | None = None,
    mask: Mask | None = None,
) -> torch.Tensor:
    """Compute attention of queries to the keys that ``row_layout`` lets them see.

    Args:
        q: (n, h, c), at least one row.
        k, v: (m, h, c).
        row_layout: the rows of each sequence, and the keys that each query sees.
        scale: factor of the products, above 0; 1 / sqrt(c) if None.
        mask: the mask of dropout; None for no dropout.

    Returns:
        (n, h, c). Products of 16-bit types are summed in fp32.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _Attention.apply(q, k, v, row_layout, scale, mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, row_layout, scale, mask):
        q, k, v = _dense(q), _dense(k), _dense(v)
        output, sums = forward(q, k, v, row_layout, scale, mask)
        ctx.save_for_backward(q, k, v, output, sums)
        ctx.row_layout = row_layout
        ctx.scale = scale
        ctx.mask = mask
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        *inputs, output, sums = ctx.saved_tensors
        gradients = [x.new_empty(x.shape) for x in inputs]
        backward(gradient, output, sums, inputs, gradients, ctx.row_layout, ctx.scale, ctx.mask)
        return *gradients, None, None, None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, row_layout: RowLayout, scale: float, mask: Mask | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``attend`` without gradient: the result (n, h, c), and the logarithms (n, h) fp32 of the sums.

    The channels of a head lie side by side in ``q``, ``k`` and ``v``.
    """
    n, h, c = q.shape
    size = tiles("forward", c, q.dtype)
    output, sums = q.new_empty(n, h, c), q.new_empty(n, h, dtype=torch.float32)
    sequences = len(row_layout.query_starts) - 1
    _forward[triton.cdiv(row_layout.longest_queries, size.queries), sequences * h](
        q,
        k,
        v,
        output,
        sums,
        *_layout_arguments(row_layout),
        *_of_mask(mask, row_layout),
        scale * LOG2_E,
        *_strides(q),
        *_strides(k),
        *_strides(v),
        **_constants(h, c, q.dtype, size, mask, row_layout),
    )
    return output, sums


def backward(
    gradient: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    row_layout: RowLayout,
    scale: float,
    mask: Mask | None,
) -> None:
    """Compute the gradients of ``attend``.

    Args:
        gradient: (n, h, c), of the result.
        output, sums: what ``forward`` returned.
        inputs: q, k and v, as ``forward`` took them.
        gradients: where to write those of q, k and v, in their shapes; the heads of a row lie side by side there.
        row_layout, scale, mask: as in ``forward``.
    """
    q, k, v = inputs
    of_q, of_k, of_v = gradients
    gradient, inner = _dense(gradient), torch.empty_like(sums)
    h, c = q.shape[1:]
    of_mask = _of_mask(mask, row_layout)
    strides = *_strides(q), *_strides(k), *_strides(v), *_strides(gradient)
    heads = (len(row_layout.query_starts) - 1) * h
    size = tiles("queries", c, q.dtype)
    _backward_queries[triton.cdiv(row_layout.longest_queries, size.queries), heads](
        q,
        k,
        v,
        gradient,
        output,
        sums,
        inner,
        *_layout_arguments(row_layout),
        *of_mask,
        of_q,
        scale,
        *strides,
        of_q.stride(0),
        **_constants(h, c, q.dtype, size, mask, row_layout),
    )
    size = tiles("keys", c, q.dtype)
    _backward_keys[triton.cdiv(row_layout.longest_keys, size.keys), heads](
        q,
        k,
        v,
        gradient,
        sums,
        inner,
        *_layout_arguments(row_layout),
        *_readers(row_layout, len(k)),
        *of_mask,
        of_k,
        of_v,
        scale,
        *strides,
        of_k.stride(0),
        of_v.stride(0),
        **_constants(h, c, q.dtype, size, mask, row_layout),
    )


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with its channels side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: torch.Tensor) -> tuple[int, int]:
    """Return the strides of rows and of heads."""
    return x.stride(0), x.stride(1)


def _layout_arguments(row_layout: RowLayout) -> tuple[torch.Tensor, ...]:
    """Return a kernel's arguments for ``row_layout``; an unused tensor stands for ``first_seen`` where that is None."""
    return (
        row_layout.query_starts,
        row_layout.key_starts,
        row_layout.last_seen,
        row_layout.last_seen if row_layout.first_seen is None else row_layout.first_seen,
    )


def _readers(row_layout: RowLayout, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``seen_from`` and ``seen_until`` of ``row_layout``, which has ``keys`` rows of keys.

    Without documents an unused tensor stands for the second one.
    """
    seen_from, seen_until = row_layout.seen_from, row_layout.seen_until
    row = torch.arange(keys, dtype=torch.int32, device=row_layout.last_seen.device) if seen_from is None else seen_from
    if seen_from is None:
        seen_from = torch.searchsorted(row_layout.last_seen, row, out_int32=True)
        if row_layout.first_seen is not None:
            seen_until = torch.searchsorted(row_layout.first_seen, row, right=True, out_int32=True)
    return seen_from, seen_from if seen_until is None else seen_until


def _of_mask(mask: Mask | None, row_layout: RowLayout) -> tuple:
    """Return a kernel's arguments for ``mask``: the halves of the keys, keys of columns, least number and scale.

    Without dropout unused tensors stand for them.
    """
    if mask is None:
        return row_layout.last_seen, row_layout.last_seen, row_layout.last_seen, 0, 1.0
    return tuple(mask)


def _constants(h: int, c: int, dtype: torch.dtype, size: Tiles, mask: Mask | None, row_layout: RowLayout) -> dict:
    """Return the options that a kernel is compiled with."""
    return launch_options(size.warps, size.stages) | {
        "H": h,
        "C": c,
        "QUERIES": size.queries,
        "KEYS": size.keys,
        "COMPUTE": compute_type(dtype),
        "PRECISION": product_precision(dtype),
        "DROPOUT": mask is not None,
        "DOCUMENTS": row_layout.first_seen is not None,
        "FACTOR": FACTOR,
    }


@jit
def _stays(first, second, columns, least, FACTOR: tl.constexpr):
    """Return which probabilities stay, for keys of rows and columns that broadcast against each other."""
    number = (first.to(tl.uint32, bitcast=True) ^ columns.to(tl.uint32, bitcast=True)) * FACTOR
    number = (number ^ (number >> 15)) * second.to(tl.uint32, bitcast=True)
    return number.to(tl.int32, bitcast=True) >= least


@jit
def _read(x, stride, row, rows, channel, GUARDED: tl.constexpr):
    """Load rows of ``x``; with ``GUARDED`` the rows from ``rows`` on are 0."""
    pointers = x + row[:, None] * stride + channel[None, :]
    if GUARDED:
        return tl.load(pointers, mask=(row < rows)[:, None], other=0.0)
    return tl.load(pointers)


@jit
def _seen(key, position, opening, DOCUMENTS: tl.constexpr):
    """Return which keys queries see; the two broadcast against each other."""
    seen = key <= position
    if DOCUMENTS:
        seen = seen & (key >= opening)
    return seen


@jit
def _edges(position, opening, count, start, keys, QUERIES: tl.constexpr, KEYS: tl.constexpr, DOC: tl.constexpr):
    """Return bounds of the keys of a block of queries.

    They are the first key that a query sees, the bounds between which every query sees every key, and the end.
    """
    row = start + tl.arange(0, QUERIES)
    end = tl.max(tl.where(row < count, position, -1), 0) + 1
    unmasked = (tl.min(tl.where(row < count, position, keys), 0) + 1) // KEYS * KEYS
    first, plain = 0, 0
    if DOC:
        first = tl.min(tl.where(row < count, opening, keys), 0) // KEYS * KEYS
        plain = tl.cdiv(tl.max(tl.where(row < count, opening, 0), 0), KEYS) * KEYS
        unmasked = tl.maximum(unmasked, first)
        plain = tl.minimum(plain, unmasked)
    return first, plain, unmasked, end


@jit
def _forward_range(
    begin,
    end,
    queries,
    position,
    opening,
    k,
    v,
    k_row,
    v_row,
    keys,
    channel,
    one,
    two,
    columns,
    least,
    kept_scale,
    scale,
    top,
    total,
    mixed,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        of_key = _read(k, k_row, key, keys, channel, MASKED).to(COMPUTE)
        of_value = _read(v, v_row, key, keys, channel, MASKED).to(COMPUTE)
        score = tl.dot(queries, tl.trans(of_key), input_precision=PRECISION)
        highest = score
        if MASKED:
            seen = _seen(key[None, :], position[:, None], opening[:, None], DOCUMENTS)
            highest = tl.where(seen, score, -1e30)
        new_top = tl.maximum(top, tl.max(highest, 1) * scale)
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(score * scale - new_top[:, None])
        if MASKED:
            weight = tl.where(seen, weight, 0.0)
        total = total * shrink + tl.sum(weight, 1)
        if DROPOUT:
            of_column = tl.load(columns + key, mask=key < keys, other=0)
            stays = _stays(one[:, None], two[:, None], of_column[None, :], least, FACTOR)
            weight = tl.where(stays, weight * kept_scale, 0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weight.to(COMPUTE), of_value, input_precision=PRECISION)
        top = new_top
    return top, total, mixed


def _forward_kernel(
    q,
    k,
    v,
    out,
    sums,
    query_starts,
    key_starts,
    last_seen,
    first_seen,
    high_keys,
    low_keys,
    columns,
    least,
    kept_scale,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    H: tl.constexpr,
    C: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    row_first = tl.load(query_starts + sequence).to(tl.int64)
    key_first = tl.load(key_starts + sequence).to(tl.int64)
    count = (tl.load(query_starts + sequence + 1) - row_first).to(tl.int32)
    keys = (tl.load(key_starts + sequence + 1) - key_first).to(tl.int32)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES  # those that see most begin first
    if start < count:
        row = start + tl.arange(0, QUERIES)
        valid = row < count
        channel = tl.arange(0, C)
        position = (tl.load(last_seen + row_first + row, mask=valid, other=-1) - key_first).to(tl.int32)
        opening = position
        if DOCUMENTS:
            opening = (tl.load(first_seen + row_first + row, mask=valid, other=0) - key_first).to(tl.int32)
        queries = _read(q + row_first * q_row + head * q_head, q_row, row, count, channel, True).to(COMPUTE)
        one, two = row, row
        if DROPOUT:
            one = tl.load(high_keys + (row_first + row) * H + head, mask=valid, other=0)
            two = tl.load(low_keys + (row_first + row) * H + head, mask=valid, other=1)
        first, plain, unmasked, end = _edges(position, opening, count, start, keys, QUERIES, KEYS, DOCUMENTS)
        k += key_first * k_row + head * k_head
        v += key_first * v_row + head * v_head
        top = tl.full((QUERIES,), -1e30, tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        mixed = tl.zeros((QUERIES, C), tl.float32)
        if DOCUMENTS:
            top, total, mixed = _forward_range(
                first, plain, queries, position, opening, k, v, k_row, v_row, keys, channel, one, two, columns, least,
                kept_scale, scale, top, total, mixed, True, KEYS, COMPUTE, PRECISION, DROPOUT, DOCUMENTS, FACTOR,
            )  # fmt: skip
        top, total, mixed = _forward_range(
            plain, unmasked, queries, position, opening, k, v, k_row, v_row, keys, channel, one, two, columns, least,
            kept_scale, scale, top, total, mixed, False, KEYS, COMPUTE, PRECISION, DROPOUT, DOCUMENTS, FACTOR,
        )  # fmt: skip
        top, total, mixed = _forward_range(
            unmasked, end, queries, position, opening, k, v, k_row, v_row, keys, channel, one, two, columns, least,
            kept_scale, scale, top, total, mixed, True, KEYS, COMPUTE, PRECISION, DROPOUT, DOCUMENTS, FACTOR,
        )  # fmt: skip
        offset = (row_first + row) * H + head
        result = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + offset[:, None] * C + channel[None, :], result, mask=valid[:, None])
        tl.store(sums + offset, top + tl.log2(total), mask=valid)


@jit
def _queries_range(
    begin,
    end,
    queries,
    of_output,
    log_sum,
    product,
    position,
    opening,
    k,
    v,
    k_row,
    v_row,
    keys,
    channel,
    one,
    two,
    columns,
    least,
    kept_scale,
    scale,
    result,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    for first in range(begin, end, KEYS):
        key = first + tl.arange(0, KEYS)
        of_key = _read(k, k_row, key, keys, channel, MASKED).to(COMPUTE)
        of_value = _read(v, v_row, key, keys, channel, MASKED).to(COMPUTE)
        score = tl.dot(queries, tl.trans(of_key), input_precision=PRECISION)
        weight = tl.exp2(score * (scale * 1.4426950408889634) - log_sum[:, None])
        if MASKED:
            weight = tl.where(_seen(key[None, :], position[:, None], opening[:, None], DOCUMENTS), weight, 0.0)
        slope = tl.dot(of_output, tl.trans(of_value), input_precision=PRECISION)
        if DROPOUT:
            of_column = tl.load(columns + key, mask=key < keys, other=0)
            stays = _stays(one[:, None], two[:, None], of_column[None, :], least, FACTOR)
            slope = tl.where(stays, slope * kept_scale, 0.0)
        slope = weight * (slope - product[:, None])
        result += tl.dot(slope.to(COMPUTE), of_key, input_precision=PRECISION)
    return result


def _backward_queries_kernel(
    q,
    k,
    v,
    gradient,
    output,
    sums,
    inner,
    query_starts,
    key_starts,
    last_seen,
    first_seen,
    high_keys,
    low_keys,
    columns,
    least,
    kept_scale,
    of_q,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    g_row,
    g_head,
    of_q_row,
    H: tl.constexpr,
    C: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    row_first = tl.load(query_starts + sequence).to(tl.int64)
    key_first = tl.load(key_starts + sequence).to(tl.int64)
    count = (tl.load(query_starts + sequence + 1) - row_first).to(tl.int32)
    keys = (tl.load(key_starts + sequence + 1) - key_first).to(tl.int32)
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    if start < count:
        row = start + tl.arange(0, QUERIES)
        valid = row < count
        channel = tl.arange(0, C)
        position = (tl.load(last_seen + row_first + row, mask=valid, other=-1) - key_first).to(tl.int32)
        opening = position
        if DOCUMENTS:
            opening = (tl.load(first_seen + row_first + row, mask=valid, other=0) - key_first).to(tl.int32)
        offset = (row_first + row) * H + head
        whole = offset[:, None] * C + channel[None, :]
        queries = _read(q + row_first * q_row + head * q_head, q_row, row, count, channel, True).to(COMPUTE)
        of_output = _read(gradient + row_first * g_row + head * g_head, g_row, row, count, channel, True)
        outputs = tl.load(output + whole, mask=valid[:, None], other=0.0)
        product = tl.sum(of_output.to(tl.float32) * outputs.to(tl.float32), 1)
        tl.store(inner + offset, product, mask=valid)
        of_output = of_output.to(COMPUTE)
        log_sum = tl.load(sums + offset, mask=valid, other=0.0)
        one, two = row, row
        if DROPOUT:
            one = tl.load(high_keys + offset, mask=valid, other=0)
            two = tl.load(low_keys + offset, mask=valid, other=1)
        first, plain, unmasked, end = _edges(position, opening, count, start, keys, QUERIES, KEYS, DOCUMENTS)
        k += key_first * k_row + head * k_head
        v += key_first * v_row + head * v_head
        result = tl.zeros((QUERIES, C), tl.float32)
        if DOCUMENTS:
            result = _queries_range(
                first, plain, queries, of_output, log_sum, product, position, opening, k, v, k_row, v_row, keys,
                channel, one, two, columns, least, kept_scale, scale, result, True, KEYS, COMPUTE, PRECISION, DROPOUT,
                DOCUMENTS, FACTOR,
            )  # fmt: skip
        result = _queries_range(
            plain, unmasked, queries, of_output, log_sum, product, position, opening, k, v, k_row, v_row, keys, channel,
            one, two, columns, least, kept_scale, scale, result, False, KEYS, COMPUTE, PRECISION, DROPOUT, DOCUMENTS,
            FACTOR,
        )  # fmt: skip
        result = _queries_range(
            unmasked, end, queries, of_output, log_sum, product, position, opening, k, v, k_row, v_row, keys, channel,
            one, two, columns, least, kept_scale, scale, result, True, KEYS, COMPUTE, PRECISION, DROPOUT, DOCUMENTS,
            FACTOR,
        )  # fmt: skip
        to = (row_first + row)[:, None] * of_q_row + head * C + channel[None, :]
        tl.store(of_q + to, (result * scale).to(of_q.dtype.element_ty), mask=valid[:, None])


@jit
def _keys_range(
    begin,
    end,
    key,
    of_key,
    of_value,
    of_column,
    q,
    gradient,
    sums,
    inner,
    last_seen,
    first_seen,
    high_keys,
    low_keys,
    least,
    kept_scale,
    scale,
    q_row,
    g_row,
    count,
    key_first,
    channel,
    key_gradient,
    value_gradient,
    MASKED: tl.constexpr,
    H: tl.constexpr,
    QUERIES: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    for start in range(begin, end, QUERIES):
        row = start + tl.arange(0, QUERIES)
        valid = row < count  # rows beyond are 0 and add nothing
        queries = _read(q, q_row, row, count, channel, True).to(COMPUTE)
        of_output = _read(gradient, g_row, row, count, channel, True).to(COMPUTE)
        log_sum = tl.load(sums + row * H, mask=valid, other=0.0)
        product = tl.load(inner + row * H, mask=valid, other=0.0)
        # Products are keys by queries: the factor of the next product stays in the registers where it was computed.
        score = tl.dot(of_key, tl.trans(queries), input_precision=PRECISION)
        weight = tl.exp2(score * (scale * 1.4426950408889634) - log_sum[None, :])
        if MASKED:
            position = (tl.load(last_seen + row, mask=valid, other=-1) - key_first).to(tl.int32)
            opening = position
            if DOCUMENTS:
                opening = (tl.load(first_seen + row, mask=valid, other=0) - key_first).to(tl.int32)
            weight = tl.where(_seen(key[:, None], position[None, :], opening[None, :], DOCUMENTS), weight, 0.0)
        slope = tl.dot(of_value, tl.trans(of_output), input_precision=PRECISION)
        dropped = weight
        if DROPOUT:
            one = tl.load(high_keys + row * H, mask=valid, other=0)
            two = tl.load(low_keys + row * H, mask=valid, other=1)
            stays = _stays(one[None, :], two[None, :], of_column[:, None], least, FACTOR)
            dropped = tl.where(stays, weight * kept_scale, 0.0)
            slope = tl.where(stays, slope * kept_scale, 0.0)
        value_gradient += tl.dot(dropped.to(COMPUTE), of_output, input_precision=PRECISION)
        slope = weight * (slope - product[None, :])
        key_gradient += tl.dot(slope.to(COMPUTE), queries, input_precision=PRECISION)
    return key_gradient, value_gradient


def _backward_keys_kernel(
    q,
    k,
    v,
    gradient,
    sums,
    inner,
    query_starts,
    key_starts,
    last_seen,
    first_seen,
    seen_from,
    seen_until,
    high_keys,
    low_keys,
    columns,
    least,
    kept_scale,
    of_k,
    of_v,
    scale,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    g_row,
    g_head,
    of_k_row,
    of_v_row,
    H: tl.constexpr,
    C: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    DROPOUT: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    sequence, head = tl.program_id(1) // H, tl.program_id(1) % H
    row_first = tl.load(query_starts + sequence).to(tl.int64)
    key_first = tl.load(key_starts + sequence).to(tl.int64)
    count = (tl.load(query_starts + sequence + 1) - row_first).to(tl.int32)
    keys = (tl.load(key_starts + sequence + 1) - key_first).to(tl.int32)
    block = tl.program_id(0)
    if block * KEYS < keys:
        key = block * KEYS + tl.arange(0, KEYS)
        inside = key < keys
        channel = tl.arange(0, C)
        of_key = _read(k + key_first * k_row + head * k_head, k_row, key, keys, channel, True).to(COMPUTE)
        of_value = _read(v + key_first * v_row + head * v_head, v_row, key, keys, channel, True).to(COMPUTE)
        of_column = key
        if DROPOUT:
            of_column = tl.load(columns + key, mask=inside, other=0)
        #    rows that see:    some   |   all   |   with documents some again
        edge = key_first + block * KEYS
        last_edge = key_first + tl.minimum(block * KEYS + KEYS, keys) - 1
        begin = (tl.load(seen_from + edge) - row_first).to(tl.int32)
        full = tl.minimum((tl.load(seen_from + last_edge) - row_first).to(tl.int32), count)
        end, plain = count, count
        if DOCUMENTS:
            plain = tl.minimum((tl.load(seen_until + edge) - row_first).to(tl.int32), count)
            end = tl.minimum((tl.load(seen_until + last_edge) - row_first).to(tl.int32), count)
        middle = tl.minimum(begin + tl.cdiv(tl.maximum(full - begin, 0), QUERIES) * QUERIES, end)
        q += row_first * q_row + head * q_head
        gradient += row_first * g_row + head * g_head
        sums += row_first * H + head
        inner += row_first * H + head
        high_keys += row_first * H + head
        low_keys += row_first * H + head
        last_seen += row_first
        first_seen += row_first
        key_gradient = tl.zeros((KEYS, C), tl.float32)
        value_gradient = tl.zeros((KEYS, C), tl.float32)
        key_gradient, value_gradient = _keys_range(
            begin, middle, key, of_key, of_value, of_column, q, gradient, sums, inner, last_seen, first_seen, high_keys,
            low_keys, least, kept_scale, scale, q_row, g_row, count, key_first, channel, key_gradient,
            value_gradient, True, H, QUERIES, COMPUTE, PRECISION, DROPOUT, DOCUMENTS, FACTOR,
        )  # fmt: skip
        last = end
        if DOCUMENTS:
            last = middle + tl.maximum(plain - middle, 0) // QUERIES * QUERIES
        key_gradient, value_gradient = _keys_range(
            middle, last, key, of_key, of_value, of_column, q, gradient, sums, inner, last_seen, first_seen, high_keys,
            low_keys, least, kept_scale, scale, q_row, g_row, count, key_first, channel, key_gradient,
            value_gradient, False, H, QUERIES, COMPUTE, PRECISION, DROPOUT, DOCUMENTS, FACTOR,
        )  # fmt: skip
        if DOCUMENTS:
            key_gradient, value_gradient = _keys_range(
                last, end, key, of_key, of_value, of_column, q, gradient, sums, inner, last_seen, first_seen, high_keys,
                low_keys, least, kept_scale, scale, q_row, g_row, count, key_first, channel, key_gradient,
                value_gradient, True, H, QUERIES, COMPUTE, PRECISION, DROPOUT, DOCUMENTS, FACTOR,
            )  # fmt: skip
        row, column = (key_first + key)[:, None], head * C + channel[None, :]
        result = (key_gradient * scale).to(of_k.dtype.element_ty)
        tl.store(of_k + row * of_k_row + column, result, mask=inside[:, None])
        tl.store(of_v + row * of_v_row + column, value_gradient.to(of_v.dtype.element_ty), mask=inside[:, None])


_forward = jit(_forward_kernel)
_backward_queries = jit(_backward_queries_kernel)
_backward_keys = jit(_backward_keys_kernel)
