"""What is done in the DCT domain of one token: spectral entropy and spectral mixing.

Shapes: N = rows (tokens), d = channels, P = numbers of a packed spectrum (see ``dct``).
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from megachiar.kernels.dct import packed, packed_dct, packed_idct, packed_power, unpacked


def spectral_entropy(x: torch.Tensor, dc_weight: float = 1.0, epsilon: float = 0.0) -> torch.Tensor:
    """Normalised entropy of each token's power spectrum (paper, spectral entropy H), with a gradient.

    ``p = X^2 / sum X^2`` with ``X`` the DCT of the token and the power of ``X_0`` taken ``dc_weight`` times;
    ``H = -sum p log(p + epsilon) / log d``.

    Args:
        x: rows (N, d).
        dc_weight: weight of the zero-frequency power.
        epsilon: added inside the logarithm.

    Returns:
        H (N,) in [0, 1] (with epsilon 0), fp32, or fp64 for fp64 rows. An all-zero token has H = 0. The gradient is
        finite where frequencies or whole tokens are empty.
    """
    return _entropy(packed_dct(x), x.shape[-1], dc_weight, epsilon)


def spectrum_and_entropy(
    x: torch.Tensor, dc_weight: float = 1.0, epsilon: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed spectrum (N, P) and entropy (N,) of rows (N, d), both fp32 (fp64 for fp64 rows) and without gradient."""
    with torch.no_grad():
        spectrum = packed_dct(x)
        return spectrum, _entropy(spectrum, x.shape[-1], dc_weight, epsilon)


def _entropy(spectrum: torch.Tensor, d: int, dc_weight: float, epsilon: float) -> torch.Tensor:
    power = packed_power(spectrum, d, dc_weight)
    total = power.sum(-1, keepdim=True)
    p = power / total.masked_fill(total == 0, 1)
    logs = torch.log(p.clamp_min(torch.finfo(p.dtype).tiny) + epsilon)  # 0 log 0 = 0
    return (p * logs).sum(-1) / -math.log(d)


def spectral_mix(x: torch.Tensor, weight: torch.Tensor, gain: float = 1.0, spectrum: torch.Tensor | None = None):
    """DCT mixing (paper, DCT-Mix): ``gain * C^T diag(weight) C x`` for each row.

    Args:
        x: rows (N, d).
        weight: filter (d,).
        gain: constant factor outside the learned filter.
        spectrum: ``packed_dct(x)`` (N, P) where it is known already, so that it is not computed twice. It carries no
            gradient: the gradient flows through ``x``.

    Returns:
        (N, d) in the type of ``x``.
    """
    return _SpectralMix.apply(x, weight, gain, spectrum)


class _SpectralMix(torch.autograd.Function):
    """The operator is symmetric: its backward pass is the operator itself on the gradient."""

    @staticmethod
    def forward(ctx, x, weight, gain, spectrum):
        spectrum = packed_dct(x) if spectrum is None else spectrum
        ctx.save_for_backward(spectrum, weight)
        ctx.gain, ctx.dtype = gain, x.dtype
        return _filtered(spectrum, weight, gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        spectrum, weight = ctx.saved_tensors
        gradient_spectrum = packed_dct(gradient)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _filtered(gradient_spectrum, weight, ctx.gain).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            sums = gradient_spectrum.mul_(spectrum).sum(0)
            of_weight = (ctx.gain * unpacked(sums, len(weight))).to(weight.dtype)
        return of_x, of_weight, None, None


def _filtered(spectrum: torch.Tensor, weight: torch.Tensor, gain: float) -> torch.Tensor:
    return packed_idct(spectrum * packed(gain * weight.to(spectrum.dtype)), len(weight))


def white_noise_entropy(d: int) -> tuple[float, float]:
    """Mean and standard deviation of H for a token of white noise with ``d`` channels.

    Power fractions of white noise follow a Dirichlet(1/2, ..., 1/2) distribution, hence the digamma functions. A
    threshold near this mean routes like a coin unless the embedding's spectra differ from noise.
    """
    half = torch.tensor([d / 2 + 1, 1.5], dtype=torch.float64)
    digamma, trigamma = torch.digamma(half), torch.polygamma(1, half)
    mean = (digamma[0] - digamma[1]) / math.log(d)
    variance = (1.5 / (d / 2 + 1) * trigamma[1] - trigamma[0]) / math.log(d) ** 2
    return mean.item(), math.sqrt(variance.item())
