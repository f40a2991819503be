"""Reorder rows with a gather in both directions: a permutation needs no scatter-add in its backward pass.

Shapes: N = rows, d = channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def permute_rows(x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """``x[order]`` for rows (N, d); ``order`` and ``inverse`` are permutations of N that undo each other."""
    return _PermuteRows.apply(x, order, inverse)


def part_rows(x: torch.Tensor, order: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """``x[order]`` in parts of ``sizes``, each with a storage of its own: what keeps one does not keep the others."""
    return _PartRows.apply(x, order, tuple(sizes))


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _PartRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, sizes):
        ctx.save_for_backward(order)
        ctx.sizes = sizes
        return tuple(x.index_select(0, part) for part in order.split(sizes))

    @staticmethod
    def backward(ctx, *gradients):
        (order,) = ctx.saved_tensors
        result = torch.empty(len(order), *gradients[0].shape[1:], dtype=gradients[0].dtype, device=order.device)
        for part, gradient in zip(order.split(ctx.sizes), gradients, strict=True):
            result.index_copy_(0, part, gradient)
        return result, None, None
