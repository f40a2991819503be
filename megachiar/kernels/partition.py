"""Partition of rows by their route, without the host: the attention rows in ascending order, then the DCT rows.

Nothing here has a shape that depends on the routes. How many attention rows there are stands on the device alone: after
them come the DCT rows, and whoever works on the one or the other reads the bound there.

Shapes: B = sequences, T = rows of a sequence, N = B * T rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from megachiar.kernels import gpu, triton_partition
from megachiar.kernels.operation import operation
from megachiar.kernels.tables import cached_table


class Partition(NamedTuple):
    """Where the rows of both operators are.

    Attributes:
        routes: (N,) int64, 1 for attention rows and 0 for DCT rows.
        order: (N,) int32, the row at each index of the operator order: attention rows lead, and rows of one operator
            ascend.
        before: (N + 1,) int32, how many attention rows come before each row, and how many there are.
        starts: (B + 1,) int32, how many attention rows come before each sequence, and how many there are.
    """

    routes: torch.Tensor
    order: torch.Tensor
    before: torch.Tensor
    starts: torch.Tensor

    @property
    def attention_rows(self) -> torch.Tensor:
        """The number of attention rows, (1,) int32 on the device."""
        return self.starts[-1:]

    def is_attention(self) -> torch.Tensor:
        """Return which of the N indices of the operator order are those of attention rows, (N,) bool."""
        return torch.arange(len(self.order), device=self.order.device) < self.attention_rows

    def places(self) -> torch.Tensor:
        """Return the index (N,) int64 of each row in the operator order, the inverse of ``order``."""
        row = torch.arange(len(self.routes), device=self.routes.device)
        before = self.before[:-1]
        return torch.where(self.routes > 0, before, self.attention_rows + row - before)


def partition(score: torch.Tensor, threshold: torch.Tensor | None, sequences: int) -> Partition:
    """Send the rows whose score is above a threshold to attention, the others to DCT mixing.

    Args:
        score: (N,) of any type.
        threshold: (1,), what the scores are compared with, on the device; None for 0.
        sequences: B.
    """
    return Partition(*_partition(score, threshold, sequences))


@operation("megachiar::partition")
def _partition(
    score: torch.Tensor, threshold: torch.Tensor | None, sequences: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if threshold is None:
        threshold = on_device(0.0, score.device, score.dtype)
    if gpu.has_kernels(score.device):
        return triton_partition.partition(score, threshold, sequences)
    attends = score > threshold
    row = torch.arange(len(score), device=score.device)
    before = F.pad(attends.cumsum(0), (1, 0))
    place = torch.where(attends, before[:-1], before[-1] + row - before[:-1])
    order = torch.empty_like(row).scatter(0, place, row)
    return attends.long(), order.int(), before.int(), before[:: len(row) // sequences].int()


@_partition.register_fake
def _(score: torch.Tensor, threshold: torch.Tensor | None, sequences: int):
    n = len(score)
    routes = score.new_empty(n, dtype=torch.int64)
    return routes, *(score.new_empty(size, dtype=torch.int32) for size in (n, n + 1, sequences + 1))


@cached_table
def on_device(value: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return ``value`` as (1,) on the device, where a kernel reads it."""
    return torch.full((1,), value, dtype=dtype, device=device)
