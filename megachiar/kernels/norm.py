"""LayerNorm of rows, with the residual addition before it.

Shapes: n = rows, d = channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megachiar.kernels import gpu, triton_norm


def add_and_norm(
    x: torch.Tensor, branch_output: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Normalise ``x + branch_output``, or ``x`` alone, over the channels (LayerNorm).

    Args:
        x: (n, d).
        branch_output: (n, d), or None.
        weight, bias: (d,).
        epsilon: number that is added to the variance.

    Returns:
        (n, d) in the type of ``x``. Mean and variance are fp32 (fp64 for fp64 rows).
    """
    if gpu.has_kernels(x.device) and triton_norm.supports(x):
        return _AddAndNorm.apply(x, branch_output, weight, bias, epsilon)
    return F.layer_norm(x if branch_output is None else x + branch_output, x.shape[-1:], weight, bias, epsilon)


class _AddAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch_output, weight, bias, epsilon):
        normed = triton_norm.normed(x, branch_output, weight, bias, epsilon)
        ctx.save_for_backward(*normed[1:], weight)
        ctx.added = branch_output is not None
        return normed.rows

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        of_sums, of_parameters = triton_norm.norm_backward(gradient, *ctx.saved_tensors)
        return of_sums, of_sums if ctx.added else None, *of_parameters.unbind(), None
