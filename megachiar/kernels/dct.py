"""The orthonormal DCT-II over the last dimension, for any length and any floating type.

    X_k = a_k sum_n x_n cos(pi (n + 1/2) k / d)      a_0 = sqrt(1/d), a_k = sqrt(2/d)

As a matrix it is ``X = C x`` with ``C`` orthogonal: the inverse is ``C^T``, and the gradient of one transform is the
other. There are two ways to compute it. A GPU is fastest with the product with ``C`` (2 d^2 FLOPs). A CPU is fastest,
from ``FFT_FROM`` channels on, with a real FFT of the same length after one permutation (Makhoul 1980; about 2.5 d log2
d FLOPs).

Most uses of a spectrum do not need it in order. ``packed_dct`` returns its numbers in the order of the transform. The
product gives them by frequency. The FFT gives them as real and imaginary parts of the half spectrum:

    X_0 . X_1 X_{d-1} X_2 X_{d-2} ...        "." is 0, and an even d has X_{d/2} twice; signs differ

``packed`` arranges weights of frequencies alike. That saves the copies that would put all rows in order.

Shapes: d = channels of a token, P = numbers of a packed spectrum, "..." = any leading dimensions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from megachiar.kernels.tables import cached_table

FFT_FROM = 128
"""With at least so many channels the FFT is faster than the matrix product on a CPU (2048 rows, transform and inverse:
1.5 against 1.8 ms at 128 channels, 1.2 against 0.9 ms at 96)."""

WIDE_RESULTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
"""Whether this torch can return products of 16-bit numbers in fp32 (``out_dtype`` of ``torch.mm``, on a GPU)."""


def dct(x: torch.Tensor) -> torch.Tensor:
    """Compute the orthonormal DCT-II of ``x`` (..., d), in the same shape: fp32, or fp64 for fp64."""
    d = x.shape[-1]
    spectrum = packed_dct(x)
    if not by_fft(d, x.device):
        return spectrum
    tables = _fft_tables(d, x.device, spectrum.dtype)
    return spectrum.index_select(-1, tables.packed_index) * tables.sign


def idct(spectrum: torch.Tensor) -> torch.Tensor:
    """Invert ``dct``: compute the orthonormal DCT-III of ``spectrum`` (..., d)."""
    spectrum, d = _computable(spectrum), spectrum.shape[-1]
    if by_fft(d, spectrum.device):
        tables = _fft_tables(d, spectrum.device, spectrum.dtype)
        spectrum = (spectrum * tables.sign).index_select(-1, tables.frequency) * tables.filled
    return packed_idct(spectrum, d)


def packed_dct(x: torch.Tensor) -> torch.Tensor:
    """Compute the numbers of ``dct`` of ``x`` (..., d) in the order that is cheapest: (..., P)."""
    d = x.shape[-1]
    if _by_halves(x):
        return _product_of_halves(x)
    x = _computable(x)
    if not by_fft(d, x.device):
        return _exact_product(x, dct_matrix(d, x.device, x.dtype).mT)
    tables = _fft_tables(d, x.device, x.dtype)
    if x.numel() == 0:  # MKL refuses to transform nothing
        return x.new_zeros(*x.shape[:-1], len(tables.frequency))
    half = torch.fft.rfft(x.index_select(-1, tables.order)).mul_(tables.twiddle)
    return torch.view_as_real(half).flatten(-2)


def packed_idct(spectrum: torch.Tensor, d: int) -> torch.Tensor:
    """Invert ``packed_dct``: turn (..., P) into (..., d)."""
    if not by_fft(d, spectrum.device):
        return _exact_product(spectrum, dct_matrix(d, spectrum.device, spectrum.dtype))
    tables = _fft_tables(d, spectrum.device, spectrum.dtype)
    if spectrum.numel() == 0:
        return spectrum.new_zeros(*spectrum.shape[:-1], d)
    half = torch.view_as_complex(spectrum.unflatten(-1, (-1, 2))) * tables.inverse_twiddle
    rows = torch.fft.irfft(half, n=d)
    if d % 2:
        return rows.index_select(-1, tables.inverse_order)
    pairs = torch.complex(rows[..., : d // 2], rows[..., d // 2 :].flip(-1))  # a third of the gather's time
    return torch.view_as_real(pairs).flatten(-2)


def packed(weights: torch.Tensor) -> torch.Tensor:
    """Arrange weights (d,) of frequencies as (P,), like the numbers of ``packed_dct``."""
    if not by_fft(len(weights), weights.device):
        return weights
    return weights.index_select(0, _fft_tables(len(weights), weights.device, torch.float32).frequency)


def unpacked(numbers: torch.Tensor, d: int) -> torch.Tensor:
    """Invert ``packed``: take the numbers (d,) of the frequencies out of (P,)."""
    if not by_fft(d, numbers.device):
        return numbers
    return numbers.index_select(0, _fft_tables(d, numbers.device, torch.float32).packed_index)


def packed_power(spectrum: torch.Tensor, d: int, dc_weight: float = 1.0) -> torch.Tensor:
    """Compute the power (..., P) of a packed spectrum: each frequency's once, that of ``X_0`` times ``dc_weight``."""
    power = spectrum.square()
    if by_fft(d, spectrum.device):
        power[..., 1] = 0  # empty
        if d % 2 == 0:
            power[..., -1] = 0  # X_{d/2} again
    if dc_weight != 1.0:
        power = torch.cat([power[..., :1] * dc_weight, power[..., 1:]], -1)
    return power


def _exact_product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Compute a product without TF32, which would change routes; in training it may be on for all other products."""
    if rows.device.type != "cuda":
        return rows @ matrix
    settings = torch.backends.cuda.matmul
    before, settings.allow_tf32 = settings.allow_tf32, False
    try:
        return rows @ matrix
    finally:
        settings.allow_tf32 = before


def _by_halves(x: torch.Tensor) -> bool:
    """Return whether 16-bit rows are transformed by two products of their type: a tenth of the time of one in fp32."""
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    return x.device.type == "cuda" and x.element_size() == 2 and WIDE_RESULTS and not needs_gradient


def _product_of_halves(x: torch.Tensor) -> torch.Tensor:
    """Transform 16-bit rows into fp32, as exactly as in fp32: the matrix is the sum of a high and a low part."""
    high, low = _matrix_halves(x.shape[-1], x.device, x.dtype)
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    result = torch.mm(rows, high, out_dtype=torch.float32) + torch.mm(rows, low, out_dtype=torch.float32)
    return result.view(x.shape)


@cached_table
def _matrix_halves(d: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two matrices (d, d) in ``dtype`` whose sum is ``C^T``."""
    exact = dct_matrix(d, torch.device("cpu"), torch.float64).mT.contiguous()
    high = exact.to(dtype)
    return high.to(device), (exact - high.double()).to(device=device, dtype=dtype)


def _computable(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def by_fft(d: int, device: torch.device) -> bool:
    """Return whether rows of ``d`` channels are transformed by FFT."""
    return device.type == "cpu" and d >= FFT_FROM


@cached_table
def dct_matrix(d: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return ``C`` (d, d) with ``X = C x``, computed in float64."""
    n = torch.arange(d, dtype=torch.float64)
    c = torch.cos(math.pi / d * (n + 0.5) * n[:, None]) * math.sqrt(2 / d)
    c[0] /= math.sqrt(2)
    return c.to(device=device, dtype=dtype)


class _FftTables(NamedTuple):
    """The tables that the FFT needs for one length.

    Attributes:
        order, inverse_order: (d,) Makhoul's permutation and its inverse.
        twiddle, inverse_twiddle: (d // 2 + 1,) complex factors, scaled so that the transform is orthonormal.
        frequency: (P,) the frequency whose number is at each index of a packed spectrum.
        packed_index, sign: (d,) the index of each frequency's number, and the factor that makes it ``X_k``.
        filled: (P,) the sign that the inverse transform wants at each index; 0 at the empty one.
    """

    order: torch.Tensor
    inverse_order: torch.Tensor
    twiddle: torch.Tensor
    inverse_twiddle: torch.Tensor
    frequency: torch.Tensor
    packed_index: torch.Tensor
    sign: torch.Tensor
    filled: torch.Tensor


@cached_table
def _fft_tables(d: int, device: torch.device, dtype: torch.dtype) -> _FftTables:
    """Return the tables for length ``d``, computed in float64."""
    order = torch.cat([torch.arange(0, d, 2), torch.arange(1, d, 2).flip(0)])
    k = torch.arange(d // 2 + 1)
    scale = torch.full(k.shape, math.sqrt(2 / d), dtype=torch.float64)
    scale[0] = math.sqrt(1 / d)
    angle = -math.pi / (2 * d) * k.double()
    complex_type = torch.complex128 if dtype == torch.float64 else torch.complex64
    twiddle, inverse = (torch.polar(s, a).to(complex_type) for s, a in ((scale, angle), (1 / scale, -angle)))
    # X_k = Re half_k up to d // 2, and the rest is X_{d-k} = -Im half_k.
    frequency = torch.stack([k, (d - k) % d], 1).flatten()
    n = torch.arange(d)
    packed_index = torch.where(n <= d // 2, 2 * n, 2 * (d - n) + 1)
    sign = torch.where(n <= d // 2, 1.0, -1.0).to(dtype)
    filled = torch.ones(len(frequency), dtype=dtype)
    filled[1] = 0
    if d % 2 == 0 and d > 1:
        filled[-1] = -1  # Im half_{d/2} = -X_{d/2}; ``sign`` has changed the signs of the others already
    tables = (order, torch.argsort(order), twiddle, inverse, frequency, packed_index, sign, filled)
    return _FftTables(*(t.to(device) for t in tables))
