"""Keyed dropout in one Triton kernel: bit for bit the torch operations in ``dropout``, which are its reference.

Shapes: n = rows, m = columns, h = heads.
"""

from __future__ import annotations

import torch

from megachiar.kernels.gpu import jit, tl, triton
from megachiar.kernels.hash import GOLDEN, MIX

BLOCK = 4096
"""The number of elements of one program."""
HALVES = 1024
"""The number of pairs of a row and a head of one program."""


def drop(
    x: torch.Tensor,
    keys: torch.Tensor,
    columns: torch.Tensor,
    site: int,
    least: int,
    scale: float,
    factor: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write ``scale * x`` to ``out`` where an element stays, and 0 where it is dropped; return ``out``.

    Args:
        x: (n, m).
        keys: (n,) int64, the rows' keys before they are mixed with ``site``.
        columns: (m,) int32, the columns' keys.
        site: number of the sub-layer in the model where it acts.
        least: the smallest int32 number of an element that stays.
        scale: factor of the elements that stay.
        factor: the first factor of the hash.
        out: (n, m), contiguous; it may be ``x``.
    """
    n, m = x.shape
    if x.numel() == 0:
        return out
    block_columns = min(triton.next_power_of_2(m), 1024)
    block_rows = BLOCK // block_columns
    grid = (triton.cdiv(n, block_rows), triton.cdiv(m, block_columns))
    _drop[grid](
        x.contiguous(),
        out,
        keys.contiguous(),
        columns,
        n,
        m,
        site,
        SCALE=scale,
        LEAST=least,
        FACTOR=factor,
        ROWS=block_rows,
        COLUMNS=block_columns,
        **_mixing(),
    )
    return out


def head_halves(
    keys: torch.Tensor, rows: torch.Tensor | None, first_head: int, heads: int, site: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the halves of the dropout keys of rows and heads, mixed with a site: both (n, h) int32, the low one odd.

    Args:
        keys: int64, the rows' keys.
        rows: (n,), which of the keys each row has; None for all of them in their order.
        first_head: number of the first head.
        heads: h.
        site: number of the sub-layer in the model where the dropout acts.
    """
    n = len(keys if rows is None else rows)
    high, low = (torch.empty(n, heads, dtype=torch.int32, device=keys.device) for _ in range(2))
    if n:
        _halves[(triton.cdiv(n * heads, HALVES),)](
            keys.contiguous(),
            keys if rows is None else rows,
            high,
            low,
            n,
            first_head,
            site,
            INDEXED=rows is not None,
            HEADS=heads,
            BLOCK=HALVES,
            **_mixing(),
        )
    return high, low


def _mixing() -> dict[str, int]:
    """Return the numbers of ``hash.mix64``."""
    (shift0, times0), (shift1, times1), (shift2, _) = MIX
    return {
        "GOLDEN": GOLDEN,
        "SHIFT0": shift0,
        "TIMES0": times0,
        "SHIFT1": shift1,
        "TIMES1": times1,
        "SHIFT2": shift2,
    }


@jit
def _mixed(
    key,
    SHIFT0: tl.constexpr,
    TIMES0: tl.constexpr,
    SHIFT1: tl.constexpr,
    TIMES1: tl.constexpr,
    SHIFT2: tl.constexpr,
):
    """Apply ``hash.mix64`` to int64 numbers; the result is uint64."""
    key = key.to(tl.uint64, bitcast=True)
    key = (key ^ (key >> SHIFT0)) * TIMES0
    key = (key ^ (key >> SHIFT1)) * TIMES1
    return key ^ (key >> SHIFT2)


def _halves_kernel(
    keys,
    rows,
    high,
    low,
    n,
    first_head,
    site,
    INDEXED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    GOLDEN: tl.constexpr,
    SHIFT0: tl.constexpr,
    TIMES0: tl.constexpr,
    SHIFT1: tl.constexpr,
    TIMES1: tl.constexpr,
    SHIFT2: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n * HEADS
    row = at // HEADS
    if INDEXED:
        row = tl.load(rows + row, mask=inside, other=0).to(tl.int64)
    key = tl.load(keys + row, mask=inside, other=0) + (at % HEADS + first_head + 1) * GOLDEN
    key = _mixed(key, SHIFT0, TIMES0, SHIFT1, TIMES1, SHIFT2).to(tl.int64, bitcast=True)
    key = _mixed(key + site.to(tl.int64) * GOLDEN, SHIFT0, TIMES0, SHIFT1, TIMES1, SHIFT2)
    tl.store(high + at, (key >> 32).to(tl.uint32).to(tl.int32, bitcast=True), mask=inside)
    tl.store(low + at, (key.to(tl.uint32) | 1).to(tl.int32, bitcast=True), mask=inside)


def _kernel(
    x,
    out,
    keys,
    columns,
    n,
    m,
    site,
    SCALE: tl.constexpr,
    LEAST: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GOLDEN: tl.constexpr,
    SHIFT0: tl.constexpr,
    TIMES0: tl.constexpr,
    SHIFT1: tl.constexpr,
    TIMES1: tl.constexpr,
    SHIFT2: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    key = tl.load(keys + row, mask=row < n, other=0) + site.to(tl.int64) * GOLDEN
    key = _mixed(key, SHIFT0, TIMES0, SHIFT1, TIMES1, SHIFT2)
    first = (key >> 32).to(tl.uint32)[:, None]
    second = key.to(tl.uint32)[:, None] | 1
    of_column = tl.load(columns + column, mask=column < m, other=0).to(tl.uint32, bitcast=True)[None, :]
    number = (first ^ of_column) * FACTOR
    number = (number ^ (number >> 15)) * second
    at = row[:, None] * m + column[None, :]
    inside = (row < n)[:, None] & (column < m)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    if value.dtype != tl.float64:
        value = value.to(tl.float32)
    value = tl.where(number.to(tl.int32, bitcast=True) >= LEAST, value * SCALE, 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


_halves = jit(_halves_kernel, do_not_specialize=["site", "first_head"])
_drop = jit(_kernel, do_not_specialize=["site"])
