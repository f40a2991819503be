"""Linear maps of rows whose number differs from step to step, as that of routed rows does.

Shapes: n = rows, N = rows of the tensor that they are indexed from, i = inputs, o = outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

ROUNDED_TO = 64
"""Rows of a 16-bit product on a CPU are rounded up to a multiple of this: oneDNN compiles a kernel for each new number
of rows, which takes ten times as long as to run it (1000 rows, 512 to 512 channels: 10.2 against 1.05 ms) and some 100
kB that it keeps."""


class IndexedRows(NamedTuple):
    """Rows as ``source[indices]``, with ``source`` (N, i) and ``indices`` (n,) int64."""

    source: torch.Tensor
    indices: torch.Tensor


def linear_of_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, indexed: IndexedRows | None = None
) -> torch.Tensor:
    """``x @ weight.T + bias`` for rows (n, i), weight (o, i) and bias (o,): (n, o).

    With ``indexed`` they are indexed again in the backward pass, and not kept where their source is kept anyway.
    """
    if indexed is None and not _rounded(x):
        return F.linear(x, weight, bias)
    source, indices = (None, None) if indexed is None else (indexed.source.detach(), indexed.indices)
    return _Linear.apply(x, weight, bias, source, indices)


def _rounded(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.element_size() == 2 and len(x) % ROUNDED_TO != 0


def _padded(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, -len(x) % ROUNDED_TO)) if _rounded(x) else x


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, source, indices):
        ctx.save_for_backward(x if source is None else source, indices, weight)
        ctx.has_bias = bias is not None
        return F.linear(_padded(x), weight, bias)[: len(x)]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, indices, weight = ctx.saved_tensors
        x = x if indices is None else x.index_select(0, indices)
        padded = _padded(gradient)
        of_x = (padded @ weight)[: len(x)] if ctx.needs_input_grad[0] else None
        return of_x, padded.mT @ _padded(x), gradient.sum(0) if ctx.has_bias else None, None, None
