"""Operations in the DCT domain of one token: spectral entropy and spectral mixing.

Shapes: N = rows (tokens), d = channels, P = numbers of a packed spectrum (see ``dct``).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megachiar.kernels import gpu, triton_factored
from megachiar.kernels.dct import dct_matrix, packed, packed_dct, packed_idct, packed_power, unpacked
from megachiar.kernels.norm import add_and_norm
from megachiar.kernels.operation import operation


def spectral_entropy(x: torch.Tensor, dc_weight: float = 1.0, epsilon: float = 0.0) -> torch.Tensor:
    """Compute the normalised entropy of each token's power spectrum (paper, spectral entropy H), with a gradient.

    It is ``H = -sum p log(p + e) / (log d + e)`` with ``p = X^2 / (sum X^2 + e / 4)`` and e = ``epsilon``. ``X`` is the
    DCT of the token, and the power of ``X_0`` counts ``dc_weight`` times. These are the places where the published code
    has its epsilon; its transform is twice this one, so that a quarter of it counts beside the power.

    Args:
        x: rows (N, d).
        dc_weight: weight of the zero-frequency power.
        epsilon: number that is added in these places.

    Returns:
        H (N,) in [0, 1] (with epsilon 0), fp32, or fp64 for fp64 rows. An all-zero token has H = 0. The gradient is
        finite where frequencies or whole tokens are empty.
    """
    return _entropy(packed_dct(x), x.shape[-1], dc_weight, epsilon)


def spectrum_and_entropy(
    x: torch.Tensor, dc_weight: float = 1.0, epsilon: float = 0.0
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Compute packed spectrum and spectral entropy of rows (N, d), without gradient.

    Returns:
        Spectrum (N, P) and entropy (N,), both fp32 (fp64 for fp64 rows). The spectrum is None on a GPU, where computing
        it again costs less than writing and reading it.
    """
    with torch.no_grad():
        if gpu.has_kernels(x.device) and triton_factored.supports(x) and epsilon == 0:
            return None, triton_factored.entropy(x.detach(), dc_weight)
        spectrum = packed_dct(x)
        entropy = _entropy(spectrum, x.shape[-1], dc_weight, epsilon)
        return (spectrum if x.device.type == "cpu" else None), entropy


@operation("megachiar::entropy_of_rows")
def entropy_of_rows(x: torch.Tensor, dc_weight: float, epsilon: float) -> torch.Tensor:
    """Compute the entropy of ``spectrum_and_entropy`` alone, which is one operation to ``torch.compile``."""
    return spectrum_and_entropy(x, dc_weight, epsilon)[1]


@entropy_of_rows.register_fake
def _(x: torch.Tensor, *_) -> torch.Tensor:
    return x.new_empty(len(x), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _entropy(spectrum: torch.Tensor, d: int, dc_weight: float, epsilon: float) -> torch.Tensor:
    """Compute spectral entropy (N,) from a packed spectrum (N, P)."""
    power = packed_power(spectrum, d, dc_weight)
    total, tiny = power.sum(-1), torch.finfo(power.dtype).tiny  # 0 log 0 = 0
    total = total.masked_fill(total == 0, 1)
    if epsilon > 0:
        p = power / (total + epsilon / 4)[:, None]
        return torch.linalg.vecdot(p, torch.log(p.clamp_min(tiny) + epsilon)) / -(math.log(d) + epsilon)
    # -sum p log p = log S - sum P log P / S with P = p S: fewer passes over the rows
    logs = power.clamp_min(tiny).log()
    return (total.log() - torch.linalg.vecdot(power, logs) / total).clamp_min(0) / math.log(d)


def spectral_mix(x: torch.Tensor, weight: torch.Tensor, gain: float = 1.0, spectrum: torch.Tensor | None = None):
    """Compute DCT mixing (paper, DCT-Mix): ``gain * C^T diag(weight) C x`` for each row.

    Args:
        x: rows (N, d).
        weight: filter (d,).
        gain: constant factor outside the learned filter.
        spectrum: ``packed_dct(x)`` (N, P) where it is known already, so that it is not computed twice; else None. It
            carries no gradient: the gradient flows through ``x``.

    Returns:
        (N, d) in the type of ``x``.
    """
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        return _filtered(packed_dct(x) if spectrum is None else spectrum, weight, gain, x.dtype)
    if x.device.type == "cpu":
        return _SpectralMix.apply(x, weight, gain, spectrum)
    return F.linear(x, filter_matrices(weight, gain))


def mix_add_and_norm(
    x: torch.Tensor,
    filters: torch.Tensor,
    gain: float,
    spectrum: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    """Normalise ``x + spectral_mix(x, filters, gain, spectrum)``; ``weight`` and ``bias`` (d,) are the norm's."""
    return add_and_norm(x, spectral_mix(x, filters, gain, spectrum), weight, bias, epsilon)


def filter_matrices(weights: torch.Tensor, gain: float) -> torch.Tensor:
    """Return ``gain * C^T diag(weight) C`` (..., d, d) for filters (..., d).

    On a GPU one product with it is faster than two transforms.
    """
    matrix = dct_matrix(weights.shape[-1], weights.device, weights.dtype)
    return (matrix.mT * (gain * weights)[..., None, :]) @ matrix


class _SpectralMix(torch.autograd.Function):
    """The operator is symmetric: its backward pass applies it to the gradient."""

    @staticmethod
    def forward(ctx, x, weight, gain, spectrum):
        spectrum = packed_dct(x) if spectrum is None else spectrum
        ctx.save_for_backward(spectrum.to(x.dtype), weight)  # for the filter's gradient alone
        ctx.gain = gain
        return _filtered(spectrum, weight, gain, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        spectrum, weight = ctx.saved_tensors
        gradient_spectrum = packed_dct(gradient)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _filtered(gradient_spectrum, weight, ctx.gain, gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = _of_filters(gradient_spectrum, spectrum, weight, ctx.gain)
        return of_x, of_weight, None, None


def _filtered(spectrum: torch.Tensor, weight: torch.Tensor, gain: float, dtype: torch.dtype) -> torch.Tensor:
    """Filter a packed spectrum (N, P), and transform it back to rows (N, d) of ``dtype``."""
    return packed_idct(spectrum * packed(gain * weight.to(spectrum.dtype)), len(weight)).to(dtype)


def _of_filters(of_spectrum: torch.Tensor, spectrum: torch.Tensor, weight: torch.Tensor, gain: float) -> torch.Tensor:
    """Compute the gradient (d,) of the filter; ``of_spectrum`` is overwritten."""
    return (gain * unpacked(of_spectrum.mul_(spectrum).sum(0), len(weight))).to(weight.dtype)


def white_noise_entropy(d: int) -> tuple[float, float]:
    """Return mean and standard deviation of H for a token of white noise with ``d`` channels.

    Power fractions of white noise follow a Dirichlet(1/2, ..., 1/2) distribution, hence the digamma functions. A
    threshold near this mean routes like a coin unless the embedding's spectra differ from noise.
    """
    half = torch.tensor([d / 2 + 1, 1.5], dtype=torch.float64, device="cpu")
    digamma, trigamma = torch.digamma(half), torch.polygamma(1, half)
    mean = (digamma[0] - digamma[1]) / math.log(d)
    variance = (1.5 / (d / 2 + 1) * trigamma[1] - trigamma[0]) / math.log(d) ** 2
    return mean.item(), math.sqrt(variance.item())
