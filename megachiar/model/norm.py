"""Where the LayerNorm of a sub-layer stands."""

from __future__ import annotations

import torch
from torch import nn


def residual_norm(x: torch.Tensor, change: torch.Tensor, norm: nn.LayerNorm | None) -> torch.Tensor:
    """``norm(x + change)`` for post-norm layers, ``x + change`` (norm None) for pre-norm ones."""
    return x + change if norm is None else norm(x + change)
