"""Part rows by their operator and join them again: a gather in one direction is a scatter in the other, never an add.

Shapes: N = rows, d = channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megachiar.kernels import gpu, triton_permute


def part_rows(x: torch.Tensor, order: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """``x[order]`` for rows (N, d) and a permutation of N, in parts of ``sizes``, each with a storage of its own: what
    keeps one does not keep the others."""
    return _PartRows.apply(x, order, tuple(sizes))


def join_rows(parts: Sequence[torch.Tensor], order: torch.Tensor) -> torch.Tensor:
    """Rows (N, d) whose ``part_rows`` are ``parts``."""
    return _JoinRows.apply(order, *parts)


class _PartRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, sizes):
        ctx.save_for_backward(order)
        ctx.sizes = sizes
        return _parted(x, order, sizes)

    @staticmethod
    def backward(ctx, *gradients):
        return _joined(gradients, *ctx.saved_tensors), None, None


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, order, *parts):
        ctx.save_for_backward(order)
        ctx.sizes = [len(part) for part in parts]
        return _joined(parts, order)

    @staticmethod
    def backward(ctx, gradient):
        return None, *_parted(gradient, *ctx.saved_tensors, ctx.sizes)


def _parted(x: torch.Tensor, order: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
    return tuple(x.index_select(0, part) for part in order.split(sizes))


def _joined(parts: Sequence[torch.Tensor], order: torch.Tensor) -> torch.Tensor:
    rows = torch.empty(len(order), *parts[0].shape[1:], dtype=parts[0].dtype, device=order.device)
    for part, place in zip(parts, order.split([len(part) for part in parts]), strict=True):
        if gpu.has_kernels(part.device) and triton_permute.supports(part):
            triton_permute.scatter(part, place, rows)
        else:
            rows.index_copy_(0, place, part)
    return rows
