"""Rotary position embedding, rotate-half form (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=32)
def rotary_table(
    length: int, head_size: int, base: float, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (length, head_size) of positions 0..length-1; angles in float64, kept per size, device and type."""
    with torch.inference_mode(False):  # training may use a table that was first asked for in inference
        frequency = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
        angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency).repeat(1, 2)
        return angle.cos().to(device=device, dtype=dtype), angle.sin().to(device=device, dtype=dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of channels of ``x`` (..., head_size); ``cos`` and ``sin`` broadcast against it."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
