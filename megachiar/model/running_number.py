"""A number that a run keeps beside its weights: fp32 whatever the model computes in, saved with the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class RunningNumber(nn.Module):
    """One fp32 number, which moves between devices with the model but is never rounded to 16 bits.

    It is a buffer: no optimizer changes it, checkpoints hold it, and the replicas of a run must agree on it.

    Attributes:
        value: (1,) fp32.

    Args:
        start: value at the start of a run.
    """

    value: torch.Tensor

    def __init__(self, start: float):
        super().__init__()
        self.register_buffer("value", torch.tensor([start], dtype=torch.float32))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RunningNumber:
        """Apply a conversion of the whole model: it moves the number, and leaves its type."""
        return super()._apply(lambda value: value.to(fn(value).device), recurse)
