"""Cross-entropy of a chunk of logits in Triton: parts of the losses, and in place the derivatives of the losses.

Shapes: n = rows, v = logits of a row.
"""

from __future__ import annotations

import torch

from megachiar.kernels.gpu import INTERPRETED, jit, launch_options, tl

BLOCK = 64 if INTERPRETED else 4096
"""The number of logits that a program holds at once."""


def supports(logits: torch.Tensor) -> bool:
    """Return whether the kernels take logits (n, v) like these."""
    return logits.dtype in (torch.float32, torch.bfloat16, torch.float16)


def scales_and_targets(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-sum-exp (n,) of each row and its logit (n,) at ``target`` (n,), both fp32.

    The logit is 0 where the target is not in [0, v).
    """
    n, v = logits.shape
    scale, at_target = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
    _read[(n,)](logits, target, scale, at_target, v, logits.stride(0), BLOCK=BLOCK, **launch_options(8))
    return scale, at_target


def slope_(logits: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Overwrite logits (n, v) with the derivatives of the losses, and return them.

    They are ``exp(logit - scale)``, less 1 at the target, and 0 in rows that do not count.

    Args:
        logits: (n, v).
        target: (n,) int64.
        scale: (n,) fp32, log-sum-exp of each row.
        counted: (n,) bool, whether a row counts.
    """
    n, v = logits.shape
    _slope[(n, -(-v // BLOCK))](logits, target, scale, counted, v, logits.stride(0), BLOCK=BLOCK, **launch_options(8))
    return logits


def _read_kernel(logits, target, scale, at_target, v, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, v, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * stride + column, mask=column < v, other=-1e30).to(tl.float32)
        new_top = tl.maximum(top, value)
        total = total * tl.exp(top - new_top) + tl.where(column < v, tl.exp(value - new_top), 0.0)
        top = new_top
    highest = tl.max(top, 0)
    tl.store(scale + row, highest + tl.log(tl.sum(total * tl.exp(top - highest), 0)))
    here = (wanted >= 0) & (wanted < v)
    tl.store(at_target + row, tl.load(logits + row * stride + wanted, mask=here, other=0.0).to(tl.float32))


def _slope_kernel(logits, target, scale, counted, v, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = row * stride + column
    value = tl.load(logits + offset, mask=column < v, other=0.0).to(tl.float32)
    slope = tl.exp(value - tl.load(scale + row)) - tl.where(column == tl.load(target + row), 1.0, 0.0)
    slope = tl.where(tl.load(counted + row) != 0, slope, 0.0)
    tl.store(logits + offset, slope.to(logits.dtype.element_ty), mask=column < v)


_read = jit(_read_kernel)
_slope = jit(_slope_kernel)
