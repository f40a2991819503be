"""Operators of other libraries, where they are installed, to be timed beside ours: flash-attn and liger-kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megachiar.kernels.ignored_target import IGNORED_TARGET

FLASH_ATTENTION = "operator, flash-attn in every row"
LIGER_LOSS = "operator, loss by liger-kernel"


def flash_attention() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return flash-attn's causal attention of q, k, v (B, T, h, c) in 16 bits on a GPU; None where it is missing."""
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return lambda q, k, v: flash_attn_func(q, k, v, causal=True)


def liger_loss() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return liger-kernel's mean cross-entropy of rows (n, d), a head (V, d) and targets (n,); None if it is missing.

    It never holds the logits (n, V), as ours does not. It runs on a GPU.
    """
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None

    def loss(x: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        result = LigerFusedLinearCrossEntropyFunction.apply(x, head, targets, None, None, IGNORED_TARGET)
        return result[0] if isinstance(result, tuple) else result  # newer versions return the loss of z too

    return loss
