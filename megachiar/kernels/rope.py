"""Rotary position embedding, rotate-half form (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from megachiar.kernels import gpu, triton_rope
from megachiar.kernels.tables import cached_table


@cached_table
def rotary_table(
    length: int, head_size: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``rotate`` needs for positions 0..length-1: cos and [-sin | sin], both (length, head_size).

    Angles are computed in float64; tables are kept per size, device and type.
    """
    frequency = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    return cos.to(device=device, dtype=dtype), sin.to(device=device, dtype=dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels (i, i + head_size / 2) of ``x`` (..., head_size).

    ``cos`` and ``sin`` are rows of ``rotary_table`` that broadcast against ``x``; they get no gradient.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """The gradient is turned back by the same angles: half the time of what autograd would derive."""

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
    """Rotated keys (..., h, c) and values (..., h, c) of ``kv`` (..., 2, h, c), which may be overwritten: it is to be
    the fresh result of a product. Their gradients are written side by side, where the product's backward wants them.
    """
    return _KeysAndValues.apply(kv, cos, sin)


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kv, cos, sin):
        ctx.save_for_backward(cos, sin)
        keys, values = kv.detach().unbind(-3)
        if _by_triton(keys, cos):
            return triton_rope.rotated(keys, cos, sin, out=keys), values
        return _rotated(keys, cos, sin, back=False), values

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
    if _by_triton(x, cos):
        return triton_rope.rotated(x, cos, sin, back)
    sin = -sin if back else sin
    first, second = x.chunk(2, -1)
    return torch.cat([second, first], -1).mul_(sin).addcmul_(x, cos)
