"""What is done in the DCT domain of one token: spectral entropy and spectral mixing.

Shapes: N = rows (tokens), d = channels.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

from megachiar.kernels.dct import dct, idct


def spectral_entropy(spectrum: torch.Tensor, dc_weight: float = 1.0, epsilon: float = 0.0) -> torch.Tensor:
    """Normalised entropy of a token's power spectrum (paper, spectral entropy H).

    ``p = X^2 / sum X^2`` with the power of ``X_0`` taken ``dc_weight`` times; ``H = -sum p log(p + epsilon) / log d``.

    Args:
        spectrum: DCT coefficients (N, d), fp32 or fp64.
        dc_weight: weight of the zero-frequency power.
        epsilon: added inside the logarithm.

    Returns:
        H (N,) in [0, 1] (with epsilon 0), in the type of ``spectrum``. An all-zero token has H = 0. The gradient is
        finite where frequencies or whole tokens are empty.
    """
    power = spectrum.square()
    if dc_weight != 1.0:
        power = torch.cat([power[..., :1] * dc_weight, power[..., 1:]], -1)
    total = power.sum(-1, keepdim=True)
    p = power / total.masked_fill(total == 0, 1)
    logs = torch.log(p.clamp_min(torch.finfo(p.dtype).tiny) + epsilon)  # 0 log 0 = 0
    return (p * logs).sum(-1) / -math.log(spectrum.shape[-1])


def spectral_mix(x: torch.Tensor, weight: torch.Tensor, gain: float = 1.0, spectrum: torch.Tensor | None = None):
    """DCT mixing (paper, DCT-Mix): ``gain * C^T diag(weight) C x`` for each row.

    Args:
        x: rows (N, d).
        weight: filter (d,).
        gain: constant factor outside the learned filter.
        spectrum: ``dct(x)`` where it is known already, so that it is not computed twice. It carries no gradient: the
            gradient flows through ``x``.

    Returns:
        (N, d) in the type of ``x``.
    """
    return _SpectralMix.apply(x, weight, gain, spectrum)


class _SpectralMix(torch.autograd.Function):
    """The operator is symmetric: its backward pass is the operator itself on the gradient."""

    @staticmethod
    def forward(ctx, x, weight, gain, spectrum):
        spectrum = dct(x) if spectrum is None else spectrum
        ctx.save_for_backward(spectrum, weight)
        ctx.gain, ctx.dtype = gain, x.dtype
        return _filtered(spectrum, weight, gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        spectrum, weight = ctx.saved_tensors
        gradient_spectrum = dct(gradient)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _filtered(gradient_spectrum, weight, ctx.gain).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (ctx.gain * (gradient_spectrum * spectrum).sum(0)).to(weight.dtype)
        return of_x, of_weight, None, None


def _filtered(spectrum: torch.Tensor, weight: torch.Tensor, gain: float) -> torch.Tensor:
    return idct(spectrum * (gain * weight.to(spectrum.dtype)))


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
