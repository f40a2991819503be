"""Rotary position embedding in its rotate-half form (RoFormer, arXiv 2104.09864).

Shapes: h = heads, c = channels of a head, "..." = any leading dimensions; B = sequences, T = tokens of a sequence,
N = B * T rows.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from megachiar.kernels import gpu, triton_rope
from megachiar.kernels.operation import operation
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


@operation("megachiar::rotate_by_partition", mutates_args=("heads", "kv"))
def rotate_by_partition(
    heads: torch.Tensor,
    kv: torch.Tensor | None,
    order: torch.Tensor,
    starts: torch.Tensor,
    length: int,
    longest: int,
    base: float,
    back: bool,
) -> None:
    """Rotate queries and keys in place, without gradient. The tables are looked up here, outside of a traced graph.

    Args:
        heads: queries (N, 1, h, c) in operator order, or queries, keys and values (N, 3, h, c) in operator order, of
            which queries and keys are rotated. Rows behind the attention rows stay as they are.
        kv: keys and values (N, 2, h, c) in the rows' first order, of which the keys are rotated; None where ``heads``
            has them.
        order: (N,) int32, the operator order.
        starts: (B + 1,) int32, whose last number is that of the attention rows.
        length: T; row i of the micro-batch is at position i % T.
        longest: the number of positions of the table.
        base: the base of the angles.
        back: whether to rotate by the negative angles.
    """
    c = heads.shape[-1]
    cos, sin = rotary_table(longest, c, base, heads.device, heads.dtype)
    turned = heads[:, : 2 if kv is None else 1].flatten(1, 2)
    if gpu.has_kernels(heads.device) and triton_rope.supports_both(turned.shape[1], c, heads.dtype):
        queries = triton_rope.Turned(turned, turned)
        keys = None if kv is None else triton_rope.Turned(kv[:, 0], kv[:, 0])
        triton_rope.rotate_both(queries, keys, None, (cos, sin), length, back, order, starts)
        return
    at = order % length
    turned.copy_(_rotated(turned, cos.index_select(0, at)[:, None], sin.index_select(0, at)[:, None], back))
    if kv is not None:
        keys = kv[:, 0].unflatten(0, (-1, length))
        keys.copy_(_rotated(keys, cos[:length, None], sin[:length, None], back))


def rotated_rows(
    q: torch.Tensor, kv: torch.Tensor, length: int, longest: int, base: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate the queries and keys of all rows, in one launch on a GPU.

    The gradients of keys and values are written side by side, where the backward pass of the product wants them.

    Args:
        q: (N, h, c), the fresh result of a product: it may be overwritten.
        kv: (N, 2, h, c), as ``q``.
        length: T; row i is at position i % T.
        longest: the number of positions of the table.
        base: the base of the angles.

    Returns:
        Rotated queries, rotated keys and values, each (B, T, h, c).
    """
    tables = rotary_table(longest, q.shape[-1], base, q.device, q.dtype)
    if gpu.has_kernels(q.device) and triton_rope.supports_both(q.shape[1], q.shape[2], q.dtype):
        return _RotateRows.apply(q, kv, *tables, length)
    cos, sin = (table[:length, None] for table in tables)
    by_sequence = -1, length
    return rotate(q.unflatten(0, by_sequence), cos, sin), *keys_and_values(kv.unflatten(0, by_sequence), cos, sin)


class _RotateRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, cos, sin, length):
        ctx.save_for_backward(cos, sin)
        ctx.length = length
        q, kv = q.detach(), kv.detach()
        queries, keys = triton_rope.Turned(q, q), triton_rope.Turned(kv[:, 0], kv[:, 0])
        triton_rope.rotate_both(queries, keys, None, (cos, sin), length, back=False)
        return tuple(x.unflatten(0, (-1, length)) for x in (q, *kv.unbind(1)))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        of_q, of_k, of_v = (g if g.stride(-1) == 1 else g.contiguous() for g in gradients)
        n, shape = len(of_q) * ctx.length, of_q.shape[2:]
        q, kv = of_q.new_empty(n, *shape), of_k.new_empty(n, 2, *shape)
        queries = triton_rope.Turned(of_q, q)
        keys, values = (triton_rope.Turned(g, kv[:, i]) for i, g in enumerate((of_k, of_v)))
        triton_rope.rotate_both(queries, keys, values, ctx.saved_tensors, ctx.length, back=True)
        return q, kv, None, None, None


def _by_triton(x: torch.Tensor, cos: torch.Tensor) -> bool:
    return gpu.has_kernels(x.device) and triton_rope.supports(x, cos)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    """Rotate ``x``, or rotate it back, without gradient."""
    if _by_triton(x, cos):
        return triton_rope.rotated(x, cos, sin, back)
    sin = -sin if back else sin
    first, second = x.chunk(2, -1)
    return torch.cat([second, first], -1).mul_(sin).addcmul_(x, cos)
