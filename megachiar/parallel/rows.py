"""Linear maps of rows whose number differs from step to step, as the number of routed rows does.

Shapes: n = rows, N = rows of the tensor that they are taken from, i = inputs, o = outputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

ROUNDED_TO = 64
"""The number of rows of a 16-bit product on a CPU is rounded up to a multiple of this. oneDNN compiles a kernel for
each new number of rows. That takes ten times as long as the product (1000 rows, 512 to 512 channels: 10.2 against
1.05 ms), and oneDNN keeps some 100 kB for it."""


class IndexedRows(NamedTuple):
    """Rows that are ``source[indices]``.

    Attributes:
        source: (N, i).
        indices: (n,) int64.
    """

    source: torch.Tensor
    indices: torch.Tensor


def linear_of_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, indexed: IndexedRows | None = None
) -> torch.Tensor:
    """Compute ``x @ weight.T + bias``.

    Args:
        x: (n, i).
        weight: (o, i).
        bias: (o,), or None.
        indexed: where the rows of ``x`` come from. With it the backward pass takes them from there again, instead of
            keeping ``x`` beside a source that is kept anyway.

    Returns:
        (n, o).
    """
    if (indexed is None or not torch.is_grad_enabled()) and not _rounded(x):
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
