"""Routed causal attention in Triton: blocks of keys that no query of a block can see are skipped in both passes.

Queries lie packed, ascending by position, each sequence's valid ones first; how many they are is read on the device, so
that the host waits for nothing. Neither pass keeps a (S, T) tensor: probabilities are computed again, and so are the
masks where they are dropped (see ``dropout``: keyed by row, head and the key's position).

Shapes: B = sequences, h = heads, S = slots for queries of a sequence, T = its keys, c = channels of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megachiar.kernels.dropout import FACTOR, KeyedDropout, column_keys, head_keys, least_kept
from megachiar.kernels.gpu import INTERPRETED, compute_type, jit, launch_options, product_precision, tl, triton
from megachiar.kernels.hash import GOLDEN, mix64, wrap64

HEAD_SIZES = (16, 32, 64, 128)
"""Channels of a head that the kernels take."""
LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """Queries and keys of a block, and what a program of each kernel is compiled with."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiles(c: int, dtype: torch.dtype, backward: bool) -> Tiles:
    """Block sizes that compile for sm_90 without spilled registers (``tests/test_kernels_triton.py`` looks)."""
    if INTERPRETED:
        return Tiles(16, 16, 4, 1)
    wide = c > 64
    if dtype == torch.float32:
        if backward:
            return Tiles(16, 32, 4, 1) if wide else Tiles(32, 32, 4, 1)
        return Tiles(64, 32, 8 if wide else 4, 1)
    if backward:
        return Tiles(32, 64, 8, 1) if wide else Tiles(64, 64, 4, 2)
    return Tiles(128, 64, 8, 2)


class Mask(NamedTuple):
    """Dropout of probabilities.

    Attributes:
        keys: (B, h, S) int64 of the queries' rows and heads, mixed with the site.
        columns: (T,) int32 of the keys.
        least: number from which a probability stays.
        scale: of those that stay.
    """

    keys: torch.Tensor
    columns: torch.Tensor
    least: int
    scale: float

    @classmethod
    def of(cls, how: KeyedDropout, sequences: int, first_head: int, heads: int, columns: int) -> Mask:
        """``how`` with the keys (B * S,) of the queries' rows, for the heads from ``first_head`` and T columns."""
        of_heads = head_keys(how.keys.view(sequences, -1), first_head, heads).transpose(1, 2)
        mixed = mix64(of_heads + wrap64(how.site * GOLDEN))
        return cls(mixed, column_keys(0, columns, mixed.device), least_kept(how.probability), how.scale)


def supports(q: torch.Tensor) -> bool:
    """Whether the kernels take queries (..., c) like these."""
    return q.shape[-1] in HEAD_SIZES and q.dtype in (torch.float32, torch.bfloat16, torch.float16)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    at: torch.Tensor,
    counts: torch.Tensor,
    scale: float | None = None,
    mask: Mask | None = None,
    since: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of queries to the keys up to their own position.

    Args:
        q: (B, h, S, c).
        k, v: (B, h, T, c).
        at: (B, S) positions of the queries; the first ``counts`` of a sequence are valid and ascend.
        counts: (B,).
        scale: of the products; 1 / sqrt(c) if not given.
        mask: of dropout.
        since: (B, S) position of the first key that each query sees, no later than its own; it never falls among the
            valid ones of a sequence. 0 if not given.

    Returns:
        (B, h, S, c); 0 where a slot is not valid. Products of 16-bit types are summed in fp32.
    """
    valid = torch.arange(at.shape[1], device=at.device) < counts[:, None]
    at = at.masked_fill(~valid, k.shape[2]).int()  # behind all keys: still ascending
    if since is not None:
        since = since.masked_fill(~valid, k.shape[2]).int()
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _Attention.apply(q, k, v, at, since, counts.int(), scale, mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, at, since, counts, scale, mask):
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        b, h, s, c = q.shape
        size = tiles(c, q.dtype, backward=False)
        output, sums = torch.zeros_like(q), q.new_zeros(b, h, s, dtype=torch.float32)
        _forward[triton.cdiv(s, size.queries), b * h](
            *(q, k, v, output, sums, at, at if since is None else since, counts),
            *(*_of_mask(mask, at), scale * LOG2_E, k.shape[2], s),
            **_constants(q, h, c, size, mask, since),
        )
        ctx.save_for_backward(q, k, v, output, sums, at, since, counts)
        ctx.scale, ctx.mask = scale, mask
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, output, sums, at, since, counts = ctx.saved_tensors
        gradient = gradient.contiguous()
        b, h, s, c = q.shape
        keys = k.shape[2]
        inner = (gradient.float() * output.float()).sum(-1)  # (B, h, S)
        of_q, of_k, of_v = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        size = tiles(c, q.dtype, backward=True)
        mask = _of_mask(ctx.mask, at)
        constants = _constants(q, h, c, size, ctx.mask, since)
        places = (at, at if since is None else since, counts)
        _backward_queries[triton.cdiv(s, size.queries), b * h](
            *(q, k, v, gradient, sums, inner, *places, *mask, of_q, ctx.scale, keys, s), **constants
        )
        # Of each block of keys the first query that sees it, and the first of those that see only later ones.
        starts = torch.arange(0, keys, size.keys, device=at.device, dtype=torch.int32).expand(b, -1).contiguous()
        first = torch.searchsorted(at, starts).int()
        last = first if since is None else torch.searchsorted(since, starts + (size.keys - 1), right=True).int()
        _backward_keys[triton.cdiv(keys, size.keys), b * h](
            *(q, k, v, gradient, sums, inner, *places, first, last, *mask, of_k, of_v, ctx.scale, keys, s), **constants
        )
        return of_q, of_k, of_v, None, None, None, None, None


def _of_mask(mask: Mask | None, at: torch.Tensor) -> tuple:
    """Two keys of 32 bits a row, those of the columns, and what stays; unused tensors without dropout."""
    if mask is None:
        return at, at, at, 0, 1.0
    keys = mask.keys.contiguous()
    return (keys >> 32).int(), (keys << 32 >> 32).int() | 1, mask.columns, mask.least, mask.scale


def _constants(q: torch.Tensor, h: int, c: int, size: Tiles, mask: Mask | None, since: torch.Tensor | None) -> dict:
    return launch_options(size.warps, size.stages) | {
        "H": h,
        "C": c,
        "QUERIES": size.queries,
        "KEYS": size.keys,
        "COMPUTE": compute_type(q.dtype),
        "PRECISION": product_precision(q.dtype),
        "DROPOUT": mask is not None,
        "DOCUMENTS": since is not None,
        "FACTOR": FACTOR,
    }


def _stays_kernel(first, second, columns, least, FACTOR: tl.constexpr):
    """Which of (rows, columns) dropout leaves."""
    number = (first.to(tl.uint32, bitcast=True)[:, None] ^ columns.to(tl.uint32, bitcast=True)[None, :]) * FACTOR
    number = (number ^ (number >> 15)) * second.to(tl.uint32, bitcast=True)[:, None]
    return number.to(tl.int32, bitcast=True) >= least


_stays = jit(_stays_kernel)


def _forward_kernel(
    q,
    k,
    v,
    out,
    sums,
    at,
    since,
    counts,
    first_keys,
    second_keys,
    columns,
    least,
    kept_scale,
    scale,
    keys,
    slots,
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
    head = tl.program_id(1).to(tl.int64)
    sequence = head // H
    count = tl.load(counts + sequence)
    start = tl.program_id(0) * QUERIES
    if start < count:
        row = start + tl.arange(0, QUERIES)
        valid = row < count
        channel = tl.arange(0, C)
        slot = (head * slots + row)[:, None] * C + channel[None, :]
        position = tl.load(at + sequence * slots + row, mask=valid, other=-1)
        lowest = tl.load(at + sequence * slots + start)
        highest = tl.load(at + sequence * slots + tl.minimum(start + QUERIES, count) - 1)
        queries = tl.load(q + slot, mask=valid[:, None], other=0.0).to(COMPUTE)
        if DROPOUT:
            one = tl.load(first_keys + head * slots + row, mask=valid, other=0)
            two = tl.load(second_keys + head * slots + row, mask=valid, other=1)
        top = tl.full((QUERIES,), -1e30, tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        mixed = tl.zeros((QUERIES, C), tl.float32)
        unmasked = (lowest + 1) // KEYS * KEYS  # every query of the block sees the keys before
        earliest = 0
        if DOCUMENTS:
            opening = tl.load(since + sequence * slots + row, mask=valid, other=0)
            earliest = tl.load(since + sequence * slots + start) // KEYS * KEYS
            latest = tl.load(since + sequence * slots + tl.minimum(start + QUERIES, count) - 1)
        for begin in range(earliest, highest + 1, KEYS):
            key = begin + tl.arange(0, KEYS)
            inside = key < keys
            place = (head * keys + key)[:, None] * C + channel[None, :]
            of_key = tl.load(k + place, mask=inside[:, None], other=0.0).to(COMPUTE)
            of_value = tl.load(v + place, mask=inside[:, None], other=0.0).to(COMPUTE)
            score = tl.dot(queries, tl.trans(of_key), input_precision=PRECISION) * scale
            if begin >= unmasked:
                score = tl.where(key[None, :] <= position[:, None], score, -1e30)
            if DOCUMENTS:  # noqa: SIM102 - one is decided when the kernel is compiled
                if begin < latest:  # a row that sees none of these keys forgets them when it sees its first
                    score = tl.where(key[None, :] >= opening[:, None], score, -1e30)
            new_top = tl.maximum(top, tl.max(score, 1))
            shrink = tl.exp2(top - new_top)
            weight = tl.exp2(score - new_top[:, None])
            total = total * shrink + tl.sum(weight, 1)
            if DROPOUT:
                of_column = tl.load(columns + key, mask=inside, other=0)
                weight = tl.where(_stays(one, two, of_column, least, FACTOR), weight * kept_scale, 0.0)
            mixed = mixed * shrink[:, None] + tl.dot(weight.to(COMPUTE), of_value, input_precision=PRECISION)
            top = new_top
        tl.store(out + slot, (mixed / total[:, None]).to(out.dtype.element_ty), mask=valid[:, None])
        tl.store(sums + head * slots + row, top + tl.log2(total), mask=valid)


def _backward_queries_kernel(
    q,
    k,
    v,
    gradient,
    sums,
    inner,
    at,
    since,
    counts,
    first_keys,
    second_keys,
    columns,
    least,
    kept_scale,
    of_q,
    scale,
    keys,
    slots,
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
    head = tl.program_id(1).to(tl.int64)
    sequence = head // H
    count = tl.load(counts + sequence)
    start = tl.program_id(0) * QUERIES
    if start < count:
        row = start + tl.arange(0, QUERIES)
        valid = row < count
        channel = tl.arange(0, C)
        slot = (head * slots + row)[:, None] * C + channel[None, :]
        position = tl.load(at + sequence * slots + row, mask=valid, other=-1)
        highest = tl.load(at + sequence * slots + tl.minimum(start + QUERIES, count) - 1)
        queries = tl.load(q + slot, mask=valid[:, None], other=0.0).to(COMPUTE)
        of_output = tl.load(gradient + slot, mask=valid[:, None], other=0.0).to(COMPUTE)
        log_sum = tl.load(sums + head * slots + row, mask=valid, other=0.0)
        product = tl.load(inner + head * slots + row, mask=valid, other=0.0)
        if DROPOUT:
            one = tl.load(first_keys + head * slots + row, mask=valid, other=0)
            two = tl.load(second_keys + head * slots + row, mask=valid, other=1)
        result = tl.zeros((QUERIES, C), tl.float32)
        earliest = 0
        if DOCUMENTS:
            opening = tl.load(since + sequence * slots + row, mask=valid, other=0)
            earliest = tl.load(since + sequence * slots + start) // KEYS * KEYS
        for begin in range(earliest, highest + 1, KEYS):
            key = begin + tl.arange(0, KEYS)
            inside = key < keys
            place = (head * keys + key)[:, None] * C + channel[None, :]
            of_key = tl.load(k + place, mask=inside[:, None], other=0.0).to(COMPUTE)
            of_value = tl.load(v + place, mask=inside[:, None], other=0.0).to(COMPUTE)
            score = tl.dot(queries, tl.trans(of_key), input_precision=PRECISION) * (scale * 1.4426950408889634)
            seen = (key[None, :] <= position[:, None]) & inside[None, :]
            if DOCUMENTS:
                seen = seen & (key[None, :] >= opening[:, None])
            weight = tl.where(seen, tl.exp2(score - log_sum[:, None]), 0.0)
            slope = tl.dot(of_output, tl.trans(of_value), input_precision=PRECISION)
            if DROPOUT:
                of_column = tl.load(columns + key, mask=inside, other=0)
                slope = tl.where(_stays(one, two, of_column, least, FACTOR), slope * kept_scale, 0.0)
            slope = weight * (slope - product[:, None]) * scale
            result += tl.dot(slope.to(COMPUTE), of_key, input_precision=PRECISION)
        tl.store(of_q + slot, result.to(of_q.dtype.element_ty), mask=valid[:, None])


def _backward_keys_kernel(
    q,
    k,
    v,
    gradient,
    sums,
    inner,
    at,
    since,
    counts,
    first_query,
    last_query,
    first_keys,
    second_keys,
    columns,
    least,
    kept_scale,
    of_k,
    of_v,
    scale,
    keys,
    slots,
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
    head = tl.program_id(1).to(tl.int64)
    sequence = head // H
    count = tl.load(counts + sequence)
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    inside = key < keys
    channel = tl.arange(0, C)
    place = (head * keys + key)[:, None] * C + channel[None, :]
    of_key = tl.load(k + place, mask=inside[:, None], other=0.0).to(COMPUTE)
    of_value = tl.load(v + place, mask=inside[:, None], other=0.0).to(COMPUTE)
    if DROPOUT:
        of_column = tl.load(columns + key, mask=inside, other=0)
    key_gradient = tl.zeros((KEYS, C), tl.float32)
    value_gradient = tl.zeros((KEYS, C), tl.float32)
    begin = tl.load(first_query + sequence * tl.num_programs(0) + tl.program_id(0))
    end = count
    if DOCUMENTS:
        end = tl.minimum(count, tl.load(last_query + sequence * tl.num_programs(0) + tl.program_id(0)))
    for start in range(begin, end, QUERIES):
        row = start + tl.arange(0, QUERIES)
        valid = row < count
        slot = (head * slots + row)[:, None] * C + channel[None, :]
        position = tl.load(at + sequence * slots + row, mask=valid, other=-1)
        queries = tl.load(q + slot, mask=valid[:, None], other=0.0).to(COMPUTE)
        of_output = tl.load(gradient + slot, mask=valid[:, None], other=0.0).to(COMPUTE)
        log_sum = tl.load(sums + head * slots + row, mask=valid, other=0.0)
        product = tl.load(inner + head * slots + row, mask=valid, other=0.0)
        score = tl.dot(queries, tl.trans(of_key), input_precision=PRECISION) * (scale * 1.4426950408889634)
        seen = (key[None, :] <= position[:, None]) & valid[:, None]
        if DOCUMENTS:
            opening = tl.load(since + sequence * slots + row, mask=valid, other=0)
            seen = seen & (key[None, :] >= opening[:, None])
        weight = tl.where(seen, tl.exp2(score - log_sum[:, None]), 0.0)
        slope = tl.dot(of_output, tl.trans(of_value), input_precision=PRECISION)
        dropped = weight
        if DROPOUT:
            one = tl.load(first_keys + head * slots + row, mask=valid, other=0)
            two = tl.load(second_keys + head * slots + row, mask=valid, other=1)
            stays = _stays(one, two, of_column, least, FACTOR)
            dropped = tl.where(stays, weight * kept_scale, 0.0)
            slope = tl.where(stays, slope * kept_scale, 0.0)
        value_gradient += tl.dot(tl.trans(dropped).to(COMPUTE), of_output, input_precision=PRECISION)
        slope = weight * (slope - product[:, None]) * scale
        key_gradient += tl.dot(tl.trans(slope).to(COMPUTE), queries, input_precision=PRECISION)
    tl.store(of_k + place, key_gradient.to(of_k.dtype.element_ty), mask=inside[:, None])
    tl.store(of_v + place, value_gradient.to(of_v.dtype.element_ty), mask=inside[:, None])


_forward = jit(_forward_kernel)
_backward_queries = jit(_backward_queries_kernel)
_backward_keys = jit(_backward_keys_kernel)
