"""How tensor-parallel ranks cut a parameter: the one rule for initial weights, checkpoints and layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megachiar.topology import TensorParallelGroup


@dataclass(frozen=True)
class Shard:
    """The cut of a parameter into one part a rank.

    The parameter has ``blocks`` equal blocks along ``dim``. Each block is cut into one piece a rank, and a rank holds
    its piece of every block. With one block a rank's part is contiguous. Keys and values are two blocks of one matrix:
    a rank's heads are a piece of both.

    Attributes:
        dim: dimension along which the parameter is cut.
        blocks: number of blocks.
    """

    dim: int
    blocks: int = 1

    def part(self, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
        """Return the part of the whole parameter that ``rank`` of ``size`` ranks holds."""
        return torch.cat(
            [whole.narrow(self.dim, start, count) for start, count, _ in self.pieces(whole.shape, rank, size)], self.dim
        )

    def pieces(self, whole: torch.Size | tuple[int, ...], rank: int, size: int) -> list[tuple[int, int, int]]:
        """Return (start in the whole, length, start in the part) along ``dim`` of each piece that ``rank`` holds."""
        block = whole[self.dim] // self.blocks
        length = block // size
        return [(i * block + rank * length, length, i * length) for i in range(self.blocks)]

    def whole_shape(self, part: torch.Size | tuple[int, ...], size: int) -> tuple[int, ...]:
        """Return the shape of the whole parameter, whose part on each of ``size`` ranks has shape ``part``."""
        return tuple(n * size if dim == self.dim else n for dim, n in enumerate(part))


def sharded(parameter: nn.Parameter, shard: Shard, group: TensorParallelGroup) -> nn.Parameter:
    """Mark ``parameter`` as this rank's part of a cut one, and return it.

    DeepSpeed counts parameters with its mark on every rank in the gradient norm, and others on the first rank alone.
    A group of one rank marks nothing.
    """
    if group.size > 1:
        parameter.shard = shard  # type: ignore[attr-defined]  # a mark of ours
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # DeepSpeed's mark
    return parameter


def shard_of(parameter: torch.Tensor) -> Shard | None:
    """Return the cut of a marked parameter; None where every rank holds all of it."""
    return getattr(parameter, "shard", None)
