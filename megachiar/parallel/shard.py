"""How a parameter is cut over tensor-parallel ranks: the one rule for initial weights, checkpoints and layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megachiar.topology import TensorParallelGroup


@dataclass(frozen=True)
class Shard:
    """Each of ``blocks`` equal blocks along ``dim`` is cut into one piece a rank; a rank holds its piece of each.

    With one block a rank's part is contiguous. Keys and values lie in two blocks of one matrix: a rank's heads are a
    piece of both.
    """

    dim: int
    blocks: int = 1

    def part(self, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """What ``rank`` of ``size`` holds of the whole parameter."""
        return torch.cat(
            [whole.narrow(self.dim, start, count) for start, count, _ in self.pieces(whole.shape, rank, size)], self.dim
        )

    def pieces(self, whole: torch.Size | tuple[int, ...], rank: int, size: int) -> list[tuple[int, int, int]]:
        """(start in the whole, length, start in the part) along ``dim`` of each piece that ``rank`` holds."""
        block = whole[self.dim] // self.blocks
        length = block // size
        return [(i * block + rank * length, length, i * length) for i in range(self.blocks)]

    def whole_shape(self, part: torch.Size | tuple[int, ...], size: int) -> tuple[int, ...]:
        return tuple(n * size if dim == self.dim else n for dim, n in enumerate(part))


def sharded(parameter: nn.Parameter, shard: Shard, group: TensorParallelGroup) -> nn.Parameter:
    """Mark ``parameter`` as this rank's part. DeepSpeed counts marked ones on every rank in the gradient norm."""
    if group.size > 1:
        parameter.shard = shard  # type: ignore[attr-defined]  # a mark of ours
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # DeepSpeed's mark
    return parameter


def shard_of(parameter: torch.Tensor) -> Shard | None:
    """The cut of a marked parameter; None where every rank holds all of it."""
    return getattr(parameter, "shard", None)
