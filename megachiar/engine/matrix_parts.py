"""Where each matrix lies in the tensors that an optimizer steps, and how its elements meet on one rank.

    parameter           whole matrices on every rank, or a part of their rows or columns (tensor parallelism)
    stepped tensor      the parameter under ZeRO 0; under ZeRO 1 and 2 a rank's equal share of all matrices in a row:

        rank 0 | query | key_value | out |   rank 1   |put | up | down |          output is split over two ranks

Muon needs the whole matrix. Ranks that step a piece of a split matrix first sum up its pieces over the data-parallel
group. They then gather the parts of the tensor-parallel group, compute the update and take their own elements of it.
A matrix that is not split costs no message of the first kind, and only the ranks that step a piece compute it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megachiar.model.hidden_matrices import HiddenMatrix
from megachiar.parallel.collectives import start_all_gather
from megachiar.parallel.shard import Shard, shard_of
from megachiar.topology import Topology


@dataclass(frozen=True)
class MatrixPart:
    """The elements of a parameter that this rank steps.

    Attributes:
        shape: of the parameter, or of this tensor-parallel rank's part of it.
        blocks: number of matrices below each other in the whole parameter.
        shard: how tensor-parallel ranks cut it; None where each has all of it.
        tensor: the stepped tensor that has the elements; None where this rank steps none of them.
        offset: number of the first of them in the flattened ``tensor``.
        start: number of the first of them in the flattened parameter.
        length: how many there are.
        is_split: whether other data-parallel ranks step the rest of the parameter.
    """

    shape: torch.Size
    blocks: int
    shard: Shard | None
    tensor: torch.Tensor | None
    offset: int
    start: int
    length: int
    is_split: bool = False

    def local(self, tensor: torch.Tensor | None) -> torch.Tensor:
        """Return the elements (n,) of a tensor that is laid out as ``self.tensor``."""
        assert tensor is not None
        return tensor.view(-1).narrow(0, self.offset, self.length)

    def cut(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the elements (n,) of a tensor in the shape of the parameter."""
        return parameter.flatten().narrow(0, self.start, self.length)


class MatrixParts:
    """The parts of all matrices of a rank, in the same order on the ranks of its data- and tensor-parallel groups."""

    def __init__(self, parts: Sequence[MatrixPart], topology: Topology, device: torch.device):
        self.parts = parts
        self.device = device
        self.topology = topology

    def exchange(
        self, direction_of: Callable[[MatrixPart], torch.Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[MatrixPart, torch.Tensor]]:
        """Yield each part with a gradient that this rank steps, and the direction in the shape of the parameter.

        All messages are sent before the first part is yielded, so that no rank waits for the products of another.

        Args:
            direction_of: returns the direction (n,) of the elements of a part that has a gradient.
            dtype: of the directions, in which they are sent and yielded.
        """
        joined: dict[int, torch.Tensor] = {}
        for number, part in enumerate(self.parts):
            if part.is_split:
                whole = torch.zeros(part.shape, dtype=dtype, device=self.device)
                if part.length:
                    whole.view(-1).narrow(0, part.start, part.length).copy_(direction_of(part))
                dist.all_reduce(whole, group=self.topology.data_group)
                if part.length:
                    joined[number] = whole
        for number, part in enumerate(self.parts):
            if number in joined:
                yield part, joined.pop(number)
            elif part.tensor is not None and part.tensor.grad is not None:
                yield part, direction_of(part).to(dtype).view(part.shape)

    def whole(self, part: MatrixPart, own: torch.Tensor) -> torch.Tensor:
        """Return the whole parameter from the parts of all tensor-parallel ranks; ``own`` is this rank's."""
        if part.shard is None:
            return own
        group = self.topology.tensor
        gathered = start_all_gather(own.contiguous(), group).wait_for().chunk(group.size)
        whole = own.new_empty(part.shard.whole_shape(own.shape, group.size))
        for rank, of_rank in enumerate(gathered):
            for start, length, at in part.shard.pieces(whole.shape, rank, group.size):
                whole.narrow(part.shard.dim, start, length).copy_(of_rank.narrow(part.shard.dim, at, length))
        return whole

    def own(self, part: MatrixPart, whole: torch.Tensor) -> torch.Tensor:
        """Return this tensor-parallel rank's part of a whole parameter."""
        group = self.topology.tensor
        return whole if part.shard is None else part.shard.part(whole, group.rank, group.size)


def place_matrices(
    matrices: Sequence[HiddenMatrix], optimizer: torch.optim.Optimizer, zero_stage: int, topology: Topology
) -> MatrixParts:
    """Find the matrices in the tensors that DeepSpeed lets ``optimizer`` step; every rank calls this function."""
    parts = [_place(matrix, optimizer, zero_stage) for matrix in matrices]
    device = matrices[0].parameter.device
    if zero_stage and topology.data_size > 1:
        split = torch.tensor([0 < part.length < part.shape.numel() for part in parts], dtype=torch.int32, device=device)
        dist.all_reduce(split, dist.ReduceOp.MAX, group=topology.data_group)
        parts = [replace(part, is_split=bool(is_split)) for part, is_split in zip(parts, split.tolist(), strict=True)]
    return MatrixParts(parts, topology, device)


def _place(matrix: HiddenMatrix, optimizer: torch.optim.Optimizer, zero_stage: int) -> MatrixPart:
    from megachiar.engine import deepspeed_patches  # here, since commands that read a checkpoint do without DeepSpeed

    parameter = matrix.parameter
    place = deepspeed_patches.Place(parameter, 0, 0, parameter.numel())
    if zero_stage:
        place = deepspeed_patches.place_in_flat(optimizer, parameter)
    return MatrixPart(
        shape=parameter.shape,
        blocks=matrix.blocks,
        shard=shard_of(parameter),
        tensor=place.tensor,
        offset=place.offset,
        start=place.start,
        length=place.length,
    )
