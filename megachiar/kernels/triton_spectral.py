"""Spectral mixing in Triton: transform and entropy in one kernel; filter, inverse transform, residual and LayerNorm in
another. Both are products with the transform's matrix, with what belongs to whole rows done while they are at hand.

Of 16-bit rows the transform is exact to fp32: the matrix is split into two of their type, high and low parts, and both
products are summed in fp32.

Shapes: n = rows, d = channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from megachiar.kernels.dct import dct_matrix
from megachiar.kernels.gpu import INTERPRETED, compute_type, jit, launch_options, product_precision, tl, triton
from megachiar.kernels.tables import kept_table


class Tiles(NamedTuple):
    """Rows and columns of a result that are computed at once, channels of a step, and how a program is compiled."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def tiles(d: int, dtype: torch.dtype) -> Tiles:
    """Block sizes that compile for sm_90 without spilled registers (``tests/test_kernels_triton.py`` looks)."""
    if INTERPRETED:
        return Tiles(16, 64, 64, 4, 1)
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 8, 2)
    return Tiles(64, 128 if d % 128 == 0 else 64, 64, 8, 3)


def supports(x: torch.Tensor) -> bool:
    """Whether the kernels take rows (n, d) like these."""
    return x.shape[-1] % 64 == 0 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def transform(
    x: torch.Tensor, dc_weight: float | None = None, epsilon: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """DCT (n, d) fp32 of rows (n, d), and with ``dc_weight`` their spectral entropy (n,) fp32."""
    x = x.contiguous()
    n, d = x.shape
    spectrum = torch.empty(n, d, dtype=torch.float32, device=x.device)
    entropy = None if dc_weight is None else torch.empty(n, dtype=torch.float32, device=x.device)
    if n == 0:
        return spectrum, entropy
    size = tiles(d, x.dtype)
    high, low = _halves(d, x.device, x.dtype)
    _transform[(triton.cdiv(n, size.rows),)](
        *(x, high, low, spectrum, spectrum if entropy is None else entropy, n),
        *(1.0 if dc_weight is None else dc_weight, epsilon, -1 / math.log(max(d, 2))),
        HALVES=1 if x.dtype == torch.float32 else 2,
        ENTROPY=entropy is not None,
        **_constants(d, size, x.dtype),
    )
    return spectrum, entropy


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
    spectrum: torch.Tensor,
    filters: torch.Tensor,
    gain: float,
    residual: torch.Tensor | None,
    norm: tuple[torch.Tensor, torch.Tensor, float] | None,
    dtype: torch.dtype,
) -> Mixed:
    """Filter a spectrum and transform it back; add a residual; normalise.

    Args:
        spectrum: (n, d) fp32.
        filters: (d,) weights of frequencies, ``gain`` times.
        residual: (n, d), added where given.
        norm: weight (d,), bias (d,) and epsilon of a LayerNorm.
        dtype: of the result.
    """
    n, d = spectrum.shape
    sums = torch.empty(n, d, dtype=dtype, device=spectrum.device)
    rows, mean, scale = sums, None, None
    weight, bias, epsilon = (filters, filters, 0.0) if norm is None else norm
    if norm is not None:
        rows = torch.empty_like(sums)
        mean, scale = (torch.empty(n, dtype=torch.float32, device=sums.device) for _ in range(2))
    if n:
        size = tiles(d, dtype)
        _mix[(triton.cdiv(n, size.rows),)](
            *(
                spectrum,
                filters,
                _halves(d, sums.device, dtype, inverse=True)[0],
                sums if residual is None else residual,
            ),
            *(weight, bias, sums, rows, sums if mean is None else mean, sums if scale is None else scale),
            *(n, gain, epsilon),
            RESIDUAL=residual is not None,
            NORM=norm is not None,
            **_constants(d, size, dtype),
        )
    return Mixed(rows, sums, mean, scale)


@kept_table
def _halves(
    d: int, device: torch.device, dtype: torch.dtype, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix (d, d) that rows are multiplied with as a sum of two in ``dtype``; in fp32 the first is all of it."""
    matrix = dct_matrix(d, torch.device("cpu"), torch.float64)
    matrix = (matrix if inverse else matrix.mT).contiguous()
    high = matrix.to(dtype)
    low = (matrix - high.double()).to(dtype)
    return high.to(device), low.to(device)


def _constants(d: int, size: Tiles, dtype: torch.dtype) -> dict:
    return launch_options(size.warps, size.stages) | {
        "D": d,
        "ROWS": size.rows,
        "COLUMNS": size.columns,
        "INNER": size.inner,
        "COMPUTE": compute_type(dtype),
        "PRECISION": product_precision(dtype),
    }


def _transform_kernel(
    x,
    high,
    low,
    spectrum,
    entropy,
    n,
    dc_weight,
    epsilon,
    per_log,
    HALVES: tl.constexpr,
    ENTROPY: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < n)[:, None]
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(0, D, INNER):
            channel = step + tl.arange(0, INNER)
            left = tl.load(x + row[:, None] * D + channel[None, :], mask=inside, other=0.0).to(COMPUTE)
            place = channel[:, None] * D + column[None, :]
            sums += tl.dot(left, tl.load(high + place).to(COMPUTE), input_precision=PRECISION)
            if HALVES == 2:
                sums += tl.dot(left, tl.load(low + place).to(COMPUTE), input_precision=PRECISION)
        tl.store(spectrum + row[:, None] * D + column[None, :], sums, mask=inside)
        if ENTROPY:
            power = sums * sums
            total += tl.sum(tl.where(column[None, :] == 0, power * dc_weight, power), 1)
    if ENTROPY:
        tl.debug_barrier()  # the spectrum is read again, by other threads than wrote it
        total = tl.where(total == 0, 1.0, total)
        mean_log = tl.zeros((ROWS,), tl.float32)
        for start in range(0, D, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            number = tl.load(spectrum + row[:, None] * D + column[None, :], mask=inside, other=0.0)
            power = number * number
            p = tl.where(column[None, :] == 0, power * dc_weight, power) / total[:, None]
            mean_log += tl.sum(p * tl.log(tl.maximum(p, 1.1754943508222875e-38) + epsilon), 1)  # 0 log 0 = 0
        tl.store(entropy + row, mean_log * per_log, mask=row < n)


def _mix_kernel(
    spectrum,
    filters,
    matrix,
    residual,
    weight,
    bias,
    sums_out,
    out,
    means,
    scales,
    n,
    gain,
    epsilon,
    RESIDUAL: tl.constexpr,
    NORM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (row < n)[:, None]
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(0, D, INNER):
            frequency = step + tl.arange(0, INNER)
            left = tl.load(spectrum + row[:, None] * D + frequency[None, :], mask=inside, other=0.0)
            left = (left * (tl.load(filters + frequency).to(tl.float32) * gain)[None, :]).to(COMPUTE)
            right = tl.load(matrix + frequency[:, None] * D + column[None, :]).to(COMPUTE)
            sums += tl.dot(left, right, input_precision=PRECISION)
        place = row[:, None] * D + column[None, :]
        if RESIDUAL:
            sums += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        rounded = sums.to(sums_out.dtype.element_ty)
        tl.store(sums_out + place, rounded, mask=inside)
        total += tl.sum(rounded.to(tl.float32), 1)
    if NORM:
        tl.debug_barrier()  # the sums are read again, by other threads than wrote them
        mean = total / D
        squares = tl.zeros((ROWS,), tl.float32)
        for start in range(0, D, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            place = row[:, None] * D + column[None, :]
            centred = tl.load(sums_out + place, mask=inside, other=0.0).to(tl.float32) - mean[:, None]
            squares += tl.sum(centred * centred, 1)
        scale = 1 / tl.sqrt(squares / D + epsilon)
        for start in range(0, D, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            place = row[:, None] * D + column[None, :]
            centred = tl.load(sums_out + place, mask=inside, other=0.0).to(tl.float32) - mean[:, None]
            of_weight = tl.load(weight + column).to(tl.float32)[None, :]
            of_bias = tl.load(bias + column).to(tl.float32)[None, :]
            result = centred * scale[:, None] * of_weight + of_bias
            tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
        tl.store(means + row, mean, mask=row < n)
        tl.store(scales + row, scale, mask=row < n)


_transform = jit(_transform_kernel)
_mix = jit(_mix_kernel)
