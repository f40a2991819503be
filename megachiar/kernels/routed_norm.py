"""LayerNorm of rows of two operators, each with the parameters of its own, with the residual addition before it.

Shapes: N = rows, d = channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megachiar.kernels import gpu, triton_norm
from megachiar.kernels.operation import operation

Tensor = torch.Tensor


class NormParameters(NamedTuple):
    """Weight and bias (d,) of a LayerNorm."""

    weight: Tensor
    bias: Tensor


def add_and_norm_by_route(
    x: Tensor,
    branches: tuple[Tensor, Tensor] | None,
    routes: Tensor,
    attention: NormParameters,
    dct: NormParameters,
    epsilon: float,
) -> Tensor:
    """Normalise each row with the parameters of its operator, after the output of the operator's branch is added.

    Args:
        x: (N, d).
        branches: (N, d) each: the output of attention, of which the attention rows are read, and that of DCT mixing, of
            which the other rows are read. None to normalise ``x`` alone.
        routes: (N,) int64, 1 for attention rows and 0 for DCT rows.
        attention, dct: the parameters of the operators.
        epsilon: number that is added to the variance.

    Returns:
        (N, d) in the type of ``x``. Mean and variance are fp32 (fp64 for fp64 rows).
    """
    attended, mixed = (None, None) if branches is None else branches
    return _NormByRoute.apply(x, attended, mixed, routes, *attention, *dct, epsilon)


def add_by_route(x: Tensor, branches: tuple[Tensor, Tensor], routes: Tensor) -> Tensor:
    """Add to each row of ``x`` (N, d) the output of its operator's branch, as ``add_and_norm_by_route`` does."""
    return x + _Choose.apply(*branches, routes)


class _Choose(torch.autograd.Function):
    """The gradients of both branches are the whole one: whoever takes them reads the rows of its operator alone."""

    @staticmethod
    def forward(ctx, attended, mixed, routes):
        return torch.where(routes[:, None] > 0, attended, mixed)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient, None


class _NormByRoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, attended, mixed, routes, weight, bias, dct_weight, dct_bias, epsilon):
        parameters = weight, bias, dct_weight, dct_bias
        rows, sums, mean, scale = _normed(x, attended, mixed, routes, *parameters, epsilon)
        ctx.added = attended is not None
        ctx.save_for_backward(sums if ctx.added else x, mean, scale, routes, weight, dct_weight)
        return rows

    @staticmethod
    def backward(ctx, gradient):
        of_sums, of_parameters = _normed_backward(gradient, *ctx.saved_tensors)
        of_branch = of_sums if ctx.added else None
        return of_sums, of_branch, of_branch, None, *of_parameters.unbind(), None


@operation("megachiar::norm_by_route")
def _normed(
    x: Tensor,
    attended: Tensor | None,
    mixed: Tensor | None,
    routes: Tensor,
    weight: Tensor,
    bias: Tensor,
    dct_weight: Tensor,
    dct_bias: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the normalised rows (N, d), and for the backward pass sums (N, d), means and scales (N,).

    Without branches the sums are ``x``, and (0,) stands for them.
    """
    if _by_triton(x):
        other = triton_norm.Other(routes, mixed, dct_weight, dct_bias)
        rows, sums, mean, scale = triton_norm.normed(x, attended, weight, bias, epsilon, other)
        return rows, x.new_empty(0) if attended is None else sums, mean, scale
    attends = routes[:, None] > 0
    sums = x if attended is None or mixed is None else x + torch.where(attends, attended, mixed)
    wide = sums.to(_wide(x))
    mean, variance = wide.mean(-1), wide.var(-1, correction=0)
    scale = (variance + epsilon).rsqrt()
    normal = (wide - mean[:, None]) * scale[:, None]
    rows = normal * torch.where(attends, weight, dct_weight) + torch.where(attends, bias, dct_bias)
    return rows.to(x.dtype), x.new_empty(0) if attended is None else sums, mean, scale


@_normed.register_fake
def _(x, attended, *_):
    sums = x.new_empty(0) if attended is None else torch.empty_like(x)
    return torch.empty_like(x), sums, *(x.new_empty(len(x), dtype=_wide(x)) for _ in range(2))


@operation("megachiar::norm_by_route_backward")
def _normed_backward(
    gradient: Tensor, sums: Tensor, mean: Tensor, scale: Tensor, routes: Tensor, weight: Tensor, dct_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the sums (N, d), and of weight, bias, DCT's weight and DCT's bias as one (4, d)."""
    if _by_triton(sums):
        return triton_norm.norm_backward(gradient, sums, mean, scale, weight, routes, dct_weight)
    attends, slope = routes[:, None] > 0, gradient.to(mean.dtype)
    normal = (sums - mean[:, None]) * scale[:, None]
    parts = (slope * normal, slope)
    of_parameters = torch.stack([torch.where(of, part, 0).sum(0) for of in (attends, ~attends) for part in parts])
    slope = slope * torch.where(attends, weight, dct_weight)
    along = (slope * normal).mean(-1, keepdim=True)
    of_sums = (slope - slope.mean(-1, keepdim=True) - normal * along) * scale[:, None]
    return of_sums.to(sums.dtype), of_parameters.to(weight.dtype)


@_normed_backward.register_fake
def _(gradient, sums, mean, scale, routes, weight, dct_weight):
    return torch.empty_like(sums), weight.new_empty(4, len(weight))


def _by_triton(x: Tensor) -> bool:
    return gpu.has_kernels(x.device) and triton_norm.supports(x)


def _wide(x: Tensor) -> torch.dtype:
    """Return the type of means and variances."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
