"""Permutation of rows into operator order and back.

A gather in one direction is a scatter in the other direction. Neither pass adds.

Shapes: N = rows, d = channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megachiar.kernels import gpu, triton_permute


def permute(x: torch.Tensor, permutation: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Return ``x[permutation]`` in parts.

    Args:
        x: rows (N, d).
        permutation: (N,) int64, a permutation of 0 to N - 1.
        sizes: how many rows each part has.

    Returns:
        One tensor a part. Each has a storage of its own: keeping one does not keep the others.
    """
    if not torch.is_grad_enabled():
        return _permuted(x, permutation, sizes)
    return _Permute.apply(x, permutation, tuple(sizes))


def unpermute(parts: Sequence[torch.Tensor], permutation: torch.Tensor) -> torch.Tensor:
    """Invert ``permute``: put the rows of ``parts`` back into their first order, (N, d)."""
    return _Unpermute.apply(permutation, *parts) if torch.is_grad_enabled() else _unpermuted(parts, permutation)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, permutation, sizes):
        ctx.save_for_backward(permutation)
        ctx.sizes = sizes
        return _permuted(x, permutation, sizes)

    @staticmethod
    def backward(ctx, *gradients):
        (permutation,) = ctx.saved_tensors
        return _unpermuted(gradients, permutation), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, permutation, *parts):
        ctx.save_for_backward(permutation)
        ctx.sizes = [len(part) for part in parts]
        return _unpermuted(parts, permutation)

    @staticmethod
    def backward(ctx, gradient):
        (permutation,) = ctx.saved_tensors
        return None, *_permuted(gradient, permutation, ctx.sizes)


def _permuted(x: torch.Tensor, permutation: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Compute ``permute`` without gradient."""
    return tuple(x.index_select(0, part) for part in permutation.split(list(sizes)))


def _unpermuted(parts: Sequence[torch.Tensor], permutation: torch.Tensor) -> torch.Tensor:
    """Compute ``unpermute`` without gradient."""
    rows = torch.empty(len(permutation), *parts[0].shape[1:], dtype=parts[0].dtype, device=permutation.device)
    for part, indices in zip(parts, permutation.split([len(part) for part in parts]), strict=True):
        if gpu.has_kernels(part.device) and triton_permute.supports(part):
            triton_permute.scatter(part, indices, rows)
        else:
            rows.index_copy_(0, indices, part)
    return rows
