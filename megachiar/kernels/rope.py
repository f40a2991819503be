"""Rotary position embedding in its rotate-half form (RoFormer, arXiv 2104.09864).

Shapes: h = heads, c = channels of a head, "..." = any leading dimensions.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from megachiar.kernels import gpu, triton_rope
from megachiar.kernels.tables import cached_table


@cached_table
def rotary_table(
    length: int, head_size: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tables of ``rotate`` for positions 0 to ``length - 1``.

    They are cos and [-sin | sin], both (length, head_size). Angles are computed in float64.
    """
    frequency = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    return cos.to(device=device, dtype=dtype), sin.to(device=device, dtype=dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of channels (i, i + c / 2) of ``x`` (..., c).

    ``cos`` and ``sin`` are rows of ``rotary_table`` that broadcast against ``x``. They get no gradient.
    """
    if not torch.is_grad_enabled():  # autograd's wrapper takes longer than a small rotation
        return _rotated(x, cos, sin, back=False)
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """The backward pass rotates the gradient back by the same angles, in half the time of autograd's own pass."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, back=True), None, None


def keys_and_values(kv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split keys and values, and rotate the keys.

    The gradients are written side by side, where the backward pass of the product wants them.

    Args:
        kv: (..., 2, h, c), the fresh result of a product: it may be overwritten.
        cos, sin: rows of ``rotary_table`` that broadcast against keys (..., h, c).

    Returns:
        Rotated keys and values, both (..., h, c).
    """
    return _split_and_rotated(kv, cos, sin) if not torch.is_grad_enabled() else _KeysAndValues.apply(kv, cos, sin)


def _split_and_rotated(kv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``keys_and_values`` without gradient."""
    keys, values = kv.unbind(-3)
    if _by_triton(keys, cos):
        return triton_rope.rotated(keys, cos, sin, out=keys), values
    return _rotated(keys, cos, sin, back=False), values


def rotate_keys(kv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the keys within ``kv``, without gradient, and return it; the arguments are ``keys_and_values``'s."""
    keys, _ = _split_and_rotated(kv, cos, sin)
    kv.select(-3, 0).copy_(keys)
    return kv


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _split_and_rotated(kv.detach(), cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, of_keys, of_values):
        cos, sin = ctx.saved_tensors
        gradient = of_keys.new_empty(*of_keys.shape[:-2], 2, *of_keys.shape[-2:])
        keys, values = gradient.unbind(-3)
        if _by_triton(of_keys, cos):
            triton_rope.rotated(of_keys, cos, sin, back=True, out=keys)
        else:
            keys.copy_(_rotated(of_keys, cos, sin, back=True))
        values.copy_(of_values)
        return gradient, None, None


def _by_triton(x: torch.Tensor, cos: torch.Tensor) -> bool:
    return gpu.has_kernels(x.device) and triton_rope.supports(x, cos)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    """Rotate ``x``, or rotate it back, without gradient."""
    if _by_triton(x, cos):
        return triton_rope.rotated(x, cos, sin, back)
    sin = -sin if back else sin
    first, second = x.chunk(2, -1)
    return torch.cat([second, first], -1).mul_(sin).addcmul_(x, cos)
