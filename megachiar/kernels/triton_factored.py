"""Spectral entropy in Triton by a factored DCT, for widths that are powers of two.

    C = P3 . blockdiag(B_g) . P2 . (R (x) I_b) . P1       d = a b,  2 d (a + 2 b) FLOPs a row instead of 2 d^2

``P1`` is Makhoul's order (J. Makhoul, 1980): even channels ascending, then odd ones descending; ``b n1 + n2`` is the
index of (n1, n2). ``R`` (a, a) is the real DFT over n1, with its rows in pairs for each pair of frequencies k1 and
a - k1. The orthogonal blocks ``B_g`` (2b, 2b) do the rest of one pair. A program has whole rows on the chip and goes
through the pairs, ``PAIRS`` at a time; nothing of the spectrum is written. On an H200, 32,768 bf16 rows of 1024 take
0.23 ms; the products with the whole matrix took 1.0 ms.

For 16-bit rows the entropy is exact to fp32: matrices and intermediate numbers are split into a high and a low part of
their type.

Shapes: n = rows, d = channels; in kernels A and B stand for a and b, R for the rows of a program.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from megachiar.kernels.dct import dct_matrix
from megachiar.kernels.gpu import INTERPRETED, compute_type, jit, launch_options, product_precision, tl, triton
from megachiar.kernels.tables import cached_table

INNER = 16
"""b: the smallest size that matrix units take, and the one with the smallest blocks."""
NARROWEST = 256
"""The least number of channels that the kernel takes."""
WIDEST = 8192
"""The most bytes of a row that a program can hold without spilled registers."""


class Tiles(NamedTuple):
    """The rows and pairs of frequencies that a program works on at once, and the options that it is compiled with."""

    rows: int
    pairs: int
    warps: int
    stages: int


def tiles(d: int, dtype: torch.dtype) -> Tiles:
    """Return the sizes for rows of ``d`` channels.

    They compile for sm_90 without spilled registers, which ``tests/kernels/test_triton.py`` checks. Those of 16-bit
    types were the fastest that were tried on an H200.
    """
    if INTERPRETED:
        return Tiles(16, 8, 4, 1)
    if d * dtype.itemsize <= 2048:
        return Tiles(16, 8, 4, 1)
    return Tiles(16, 8, 8, 2 if dtype != torch.float32 else 1)


def supports(x: torch.Tensor) -> bool:
    """Return whether the kernel takes rows (n, d) like these."""
    d = x.shape[-1]
    return (
        d >= NARROWEST
        and d & (d - 1) == 0
        and d * x.element_size() <= WIDEST
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


class Factors(NamedTuple):
    """The factors of the DCT for one width and type, as high and low parts; for fp32 the high part is all.

    Attributes:
        outer_high, outer_low: R (a, a).
        inner_high, inner_low: the blocks B (a / 2, 2b, 2b).
    """

    outer_high: torch.Tensor
    outer_low: torch.Tensor
    inner_high: torch.Tensor
    inner_low: torch.Tensor


@cached_table
def factors(d: int, device: torch.device, dtype: torch.dtype) -> Factors:
    """Return the factors for ``d`` channels, computed in float64."""
    a, b = d // INNER, INNER
    n1, pair, k2 = torch.arange(a, dtype=torch.float64), torch.arange(1, a // 2)[:, None], torch.arange(b)
    angle = pair * n1 * (2 * math.pi / a)
    outer = torch.empty(a // 2, 2, a, dtype=torch.float64)
    outer[0, 0], outer[0, 1] = 1 / math.sqrt(a), torch.cos(math.pi * n1) / math.sqrt(a)
    outer[1:, 0], outer[1:, 1] = angle.cos() * math.sqrt(2 / a), angle.sin() * math.sqrt(2 / a)
    first = torch.stack([a * k2, a // 2 + a * k2])[None]
    others = torch.stack([pair + a * k2, (d - pair - a * k2) % d], 1)
    frequency = torch.cat([first, others])  # (a / 2, 2, b)
    index = torch.arange(d)
    channel = torch.where(index < d // 2, 2 * index, 2 * (d - 1 - index) + 1)
    matrix = dct_matrix(d, torch.device("cpu"), torch.float64)[:, channel]  # of channels in Makhoul's order
    of_pair = matrix[frequency.flatten()].view(a // 2, 2 * b, a, b)
    inner = torch.einsum("gkAn,grA->gkrn", of_pair, outer).reshape(a // 2, 2 * b, 2 * b)
    outer = outer.reshape(a, a)
    halves = []
    for exact in (outer, inner):
        high = exact.to(dtype)
        halves += [high, (exact - high.double()).to(dtype)]
    return Factors(*(t.contiguous().to(device) for t in halves))


def entropy(x: torch.Tensor, dc_weight: float = 1.0) -> torch.Tensor:
    """Compute the spectral entropy (n,) fp32 of rows (n, d), with the power of ``X_0`` taken ``dc_weight`` times."""
    x = x.contiguous()
    n, d = x.shape
    result = torch.empty(n, dtype=torch.float32, device=x.device)
    if n:
        size, parts = tiles(d, x.dtype), factors(d, x.device, x.dtype)
        _entropy[(triton.cdiv(n, size.rows),)](
            x,
            parts.outer_high,
            parts.outer_low,
            parts.inner_high,
            parts.inner_low,
            result,
            n,
            DC_WEIGHT=dc_weight,
            PER_LOG=1 / math.log(d),
            SPLIT=x.dtype != torch.float32,
            **_constants(d, size, x.dtype),
        )
    return result


def _constants(d: int, size: Tiles, dtype: torch.dtype) -> dict:
    """Return the options that the kernel is compiled with."""
    return launch_options(size.warps, size.stages) | {
        "D": d,
        "A": d // INNER,
        "B": INNER,
        "R": size.rows,
        "PAIRS": size.pairs,
        "COMPUTE": compute_type(dtype),
        "PRECISION": product_precision(dtype),
    }


@jit
def _channels(D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr):
    """Return the channel (A, R * B) of n1 and of (row, n2): channels of one row are two apart."""
    index = tl.arange(0, A)[:, None] * B + (tl.arange(0, R * B) % B)[None, :]
    return tl.where(index < D // 2, 2 * index, 2 * (D - 1 - index) + 1)


@jit
def _by_pair(u, B: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr):
    """Turn (2 PAIRS, R * B) into (PAIRS, 2B, R)."""
    return tl.reshape(tl.permute(tl.reshape(u, (PAIRS, 2, R, B)), (0, 1, 3, 2)), (PAIRS, 2 * B, R))


def _entropy_kernel(
    x,
    outer_high,
    outer_low,
    inner_high,
    inner_low,
    out,
    n,
    DC_WEIGHT: tl.constexpr,
    PER_LOG: tl.constexpr,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * R
    row = first + tl.arange(0, R * B) // B
    rows = tl.load(x + row[None, :] * D + _channels(D, A, B, R), mask=(row < n)[None, :], other=0.0).to(COMPUTE)
    total = tl.zeros((R,), tl.float32)
    logs = tl.zeros((R,), tl.float32)
    column = tl.arange(0, 2 * B)
    for start in range(0, A // 2, PAIRS):
        outer = (2 * start + tl.arange(0, 2 * PAIRS))[:, None] * A + tl.arange(0, A)[None, :]
        u = tl.dot(tl.load(outer_high + outer).to(COMPUTE), rows, input_precision=PRECISION)
        if SPLIT:
            u += tl.dot(tl.load(outer_low + outer).to(COMPUTE), rows, input_precision=PRECISION)
        u = _by_pair(u, B, R, PAIRS)
        pair = start + tl.arange(0, PAIRS)
        inner = pair[:, None, None] * (4 * B * B) + column[None, :, None] * (2 * B) + column[None, None, :]
        high = tl.load(inner_high + inner).to(COMPUTE)
        of_high = u.to(COMPUTE)
        number = tl.dot(high, of_high, input_precision=PRECISION)  # (PAIRS, 2B, R)
        if SPLIT:
            number += tl.dot(high, (u - of_high.to(tl.float32)).to(COMPUTE), input_precision=PRECISION)
            number += tl.dot(tl.load(inner_low + inner).to(COMPUTE), of_high, input_precision=PRECISION)
        power = number * number
        if DC_WEIGHT != 1:
            at_zero = (pair[:, None, None] == 0) & (column[None, :, None] == 0)
            power = tl.where(at_zero, power * DC_WEIGHT, power)
        total += tl.sum(tl.sum(power, 1), 0)
        logs += tl.sum(tl.sum(power * tl.log(tl.maximum(power, 1.1754943508222875e-38)), 1), 0)
    # -sum p log p = log S - sum P log P / S with P = p S
    total = tl.where(total == 0, 1.0, total)
    result = tl.maximum(tl.log(total) - logs / total, 0.0) * PER_LOG
    at = first + tl.arange(0, R)
    tl.store(out + at, result, mask=at < n)


_entropy = jit(_entropy_kernel)
