"""Spectral entropy and spectral mixing in Triton by a factored DCT, for widths that are powers of two.

    C = P3 . blockdiag(B_g) . P2 . (R (x) I_b) . P1       d = a b,  2 d (a + 2 b) FLOPs a row instead of 2 d^2

``P1`` is Makhoul's order (J. Makhoul, 1980): even channels ascending, then odd ones descending, ``b n1 + n2`` the place
of (n1, n2). ``R`` (a, a) is the real DFT over n1, its rows in pairs for each pair of frequencies k1 and a - k1; the
orthogonal blocks ``B_g`` (2b, 2b) do the rest of one pair. All factors are orthogonal, so that the inverse is their
transposes in reverse. A program has whole rows on the chip and goes through the pairs by ``PAIRS``; nothing is written
in between.

Of 16-bit rows the entropy is exact to fp32: matrices and intermediate numbers are split into two of their type, high
and low parts. Mixing rounds in between, as every product of 16-bit numbers does.

Shapes: n = rows, d = channels; in kernels A and B stand for a and b, R for the rows of a program.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from megachiar.kernels.dct import dct_matrix
from megachiar.kernels.gpu import INTERPRETED, compute_type, jit, launch_options, product_precision, tl, triton
from megachiar.kernels.tables import kept_table

INNER = 16
"""b: the smallest that matrix units take, and the one with the smallest blocks."""
NARROWEST = 256
WIDEST_ENTROPY, WIDEST_MIX = 8192, 2048
"""Bytes of a row up to which a program has its entropy, or its result, without spilled registers."""


class Tiles(NamedTuple):
    """Rows and pairs of frequencies that a program works on at once, and how it is compiled."""

    rows: int
    pairs: int
    warps: int
    stages: int


def tiles(kernel: str, d: int, dtype: torch.dtype) -> Tiles:
    """Of the kernel ``entropy`` or ``mix``: sizes that compile for sm_90 without spilled registers
    (``tests/test_kernels_triton.py`` looks)."""
    if INTERPRETED:
        return Tiles(16, 8, 4, 1)
    row = d * dtype.itemsize
    if kernel == "entropy":
        return Tiles(32 if row <= 2048 else 16, 8, 8, 1)
    return Tiles(16 if row < WIDEST_MIX else 8, 8, 8, 1)


def has_entropy(x: torch.Tensor) -> bool:
    """Whether ``entropy`` takes rows (n, d) like these."""
    return _factored(x) and x.shape[-1] * x.element_size() <= WIDEST_ENTROPY


def has_mix(x: torch.Tensor) -> bool:
    """Whether ``mix`` takes rows (n, d) like these."""
    return _factored(x) and x.shape[-1] * x.element_size() <= WIDEST_MIX


def _factored(x: torch.Tensor) -> bool:
    d = x.shape[-1]
    return d >= NARROWEST and d & (d - 1) == 0 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


class Factors(NamedTuple):
    """Of one width and type, as high and low parts; of fp32 the high part is all.

    Attributes:
        outer_high, outer_low: R (a, a).
        inner_high, inner_low: B (a / 2, 2b, 2b).
        frequency: (d,) int64, which frequency each number of the last factor is.
        place: (d,) int64, its inverse.
    """

    outer_high: torch.Tensor
    outer_low: torch.Tensor
    inner_high: torch.Tensor
    inner_low: torch.Tensor
    frequency: torch.Tensor
    place: torch.Tensor


@kept_table
def factors(d: int, device: torch.device, dtype: torch.dtype) -> Factors:
    """Computed in float64."""
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
    frequency = frequency.flatten()
    halves = []
    for exact in (outer, inner):
        high = exact.to(dtype)
        halves += [high, (exact - high.double()).to(dtype)]
    return Factors(*(t.contiguous().to(device) for t in (*halves, frequency, frequency.argsort())))


def entropy(x: torch.Tensor, dc_weight: float = 1.0) -> torch.Tensor:
    """Spectral entropy (n,) fp32 of rows (n, d), the power of frequency zero taken ``dc_weight`` times."""
    x = x.contiguous()
    n, d = x.shape
    result = torch.empty(n, dtype=torch.float32, device=x.device)
    if n:
        size, parts = tiles("entropy", d, x.dtype), factors(d, x.device, x.dtype)
        _entropy[(triton.cdiv(n, size.rows),)](
            *(x, *parts[:4], result, n),
            DC_WEIGHT=dc_weight,
            PER_LOG=1 / math.log(d),
            SPLIT=x.dtype != torch.float32,
            **_constants(d, size, x.dtype),
        )
    return result


class Mixed(NamedTuple):
    """Attributes:
    rows: (n, d) the result.
    sums: (n, d) what was normalised; the result itself without a norm.
    mean, scale: (n,) fp32 of the norm; None without one.
    """

    rows: torch.Tensor
    sums: torch.Tensor
    mean: torch.Tensor | None
    scale: torch.Tensor | None


def mix(
    x: torch.Tensor,
    filters: torch.Tensor,
    gain: float,
    residual: bool,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> Mixed:
    """``gain * C^T diag(filters) C x`` of rows (n, d), plus ``x`` with ``residual``, normalised with ``norm``: weight
    (d,), bias (d,) and epsilon of a LayerNorm."""
    x = x.contiguous()
    n, _ = x.shape
    sums = torch.empty_like(x)
    rows, mean, scale = sums, None, None
    if norm is not None:
        rows = torch.empty_like(x)
        mean, scale = (torch.empty(n, dtype=torch.float32, device=x.device) for _ in range(2))
    if n:
        _launch(x, None, filters, gain, residual, norm, Mixed(rows, sums, mean, scale), None)
    return Mixed(rows, sums, mean, scale)


def mix_backward(
    gradient: torch.Tensor, x: torch.Tensor, filters: torch.Tensor, gain: float, residual: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the rows (n, d) and of the filters (d,) of ``mix`` without a norm, the operator being symmetric."""
    gradient, x = gradient.contiguous(), x.contiguous()
    n, d = x.shape
    of_x = torch.empty_like(x)
    blocks = triton.cdiv(n, tiles("mix", d, x.dtype).rows)
    of_filters = torch.empty(blocks, d, dtype=torch.float32, device=x.device)
    if n:
        _launch(gradient, x, filters, gain, residual, None, Mixed(of_x, of_x, None, None), of_filters)
    of_filters = of_filters.sum(0).index_select(0, factors(d, x.device, x.dtype).place)
    return of_x, (gain * of_filters).to(filters.dtype)


def _launch(
    x: torch.Tensor,
    partner: torch.Tensor | None,
    filters: torch.Tensor,
    gain: float,
    residual: bool,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None,
    into: Mixed,
    products: torch.Tensor | None,
) -> None:
    """``products`` (blocks, d): of the spectra of ``x`` and ``partner``, summed over the rows of each block."""
    n, d = x.shape
    size, parts = tiles("mix", d, x.dtype), factors(d, x.device, x.dtype)
    weight, bias, epsilon = (filters, filters, 0.0) if norm is None else norm
    _mix[(triton.cdiv(n, size.rows),)](
        *(x, x if partner is None else partner, parts.outer_high, parts.inner_high),
        *(filters.index_select(0, parts.frequency), weight, bias, into.sums, into.rows),
        *(into.rows if t is None else t for t in (into.mean, into.scale, products)),
        n,
        GAIN=gain,
        EPSILON=epsilon,
        RESIDUAL=residual,
        NORM=norm is not None,
        PRODUCTS=products is not None,
        **_constants(d, size, x.dtype),
    )


def _constants(d: int, size: Tiles, dtype: torch.dtype) -> dict:
    return launch_options(size.warps, size.stages) | {
        "D": d,
        "A": d // INNER,
        "B": INNER,
        "R": size.rows,
        "PAIRS": size.pairs,
        "COMPUTE": compute_type(dtype),
        "PRECISION": product_precision(dtype),
    }


def _channels_kernel(D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, R: tl.constexpr):
    """Channel (A, R * B) of n1 and of (row, n2): those of one row lie two apart."""
    index = tl.arange(0, A)[:, None] * B + (tl.arange(0, R * B) % B)[None, :]
    return tl.where(index < D // 2, 2 * index, 2 * (D - 1 - index) + 1)


_channels = jit(_channels_kernel)


def _by_pair_kernel(u, B: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr):
    """(2 PAIRS, R * B) to (PAIRS, 2B, R)."""
    return tl.reshape(tl.permute(tl.reshape(u, (PAIRS, 2, R, B)), (0, 1, 3, 2)), (PAIRS, 2 * B, R))


_by_pair = jit(_by_pair_kernel)


def _by_row_kernel(y, B: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr):
    """(PAIRS, 2B, R) to (2 PAIRS, R * B)."""
    return tl.reshape(tl.permute(tl.reshape(y, (PAIRS, 2, B, R)), (0, 1, 3, 2)), (2 * PAIRS, R * B))


_by_row = jit(_by_row_kernel)


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


def _mix_kernel(
    x,
    partner,
    outer_factor,
    inner_factor,
    filters,
    weight,
    bias,
    sums_out,
    out,
    means,
    scales,
    products,
    n,
    GAIN: tl.constexpr,
    EPSILON: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    PRODUCTS: tl.constexpr,
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
    channel = _channels(D, A, B, R)
    place = row[None, :] * D + channel
    inside = (row < n)[None, :]
    rows = tl.load(x + place, mask=inside, other=0.0).to(COMPUTE)
    others = rows
    if PRODUCTS:
        others = tl.load(partner + place, mask=inside, other=0.0).to(COMPUTE)
    sums = tl.zeros((A, R * B), tl.float32)
    column = tl.arange(0, 2 * B)
    for start in range(0, A // 2, PAIRS):
        outer = (2 * start + tl.arange(0, 2 * PAIRS))[:, None] * A + tl.arange(0, A)[None, :]
        of_outer = tl.load(outer_factor + outer).to(COMPUTE)
        pair = start + tl.arange(0, PAIRS)
        inner = pair[:, None, None] * (4 * B * B) + column[None, :, None] * (2 * B) + column[None, None, :]
        of_inner = tl.load(inner_factor + inner).to(COMPUTE)
        u = _by_pair(tl.dot(of_outer, rows, input_precision=PRECISION).to(COMPUTE), B, R, PAIRS)
        number = tl.dot(of_inner, u, input_precision=PRECISION)  # (PAIRS, 2B, R)
        frequency = pair[:, None] * (2 * B) + column[None, :]
        if PRODUCTS:
            u = _by_pair(tl.dot(of_outer, others, input_precision=PRECISION).to(COMPUTE), B, R, PAIRS)
            product = tl.sum(number * tl.dot(of_inner, u, input_precision=PRECISION), 2)
            tl.store(products + tl.program_id(0).to(tl.int64) * D + frequency, product)
        number *= (tl.load(filters + frequency).to(tl.float32) * GAIN)[:, :, None]
        back = tl.dot(tl.permute(of_inner, (0, 2, 1)), number.to(COMPUTE), input_precision=PRECISION)
        sums += tl.dot(
            tl.trans(of_outer), _by_row(back, B, R, PAIRS).to(COMPUTE), input_precision=PRECISION
        )  # (A, R * B)
    if RESIDUAL:
        sums += rows.to(tl.float32)
    rounded = sums.to(sums_out.dtype.element_ty)
    tl.store(sums_out + place, rounded, mask=inside)
    if NORM:
        sums = tl.reshape(rounded.to(tl.float32), (A, R, B))
        mean = tl.sum(tl.sum(sums, 2), 0) / D
        sums -= mean[None, :, None]
        scale = 1 / tl.sqrt(tl.sum(tl.sum(sums * sums, 2), 0) / D + EPSILON)
        normal = tl.reshape(sums * scale[None, :, None], (A, R * B))
        result = normal * tl.load(weight + channel).to(tl.float32) + tl.load(bias + channel).to(tl.float32)
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
        at = first + tl.arange(0, R)
        tl.store(means + at, mean, mask=at < n)
        tl.store(scales + at, scale, mask=at < n)


_entropy = jit(_entropy_kernel)
_mix = jit(_mix_kernel)
