"""What Muon computes and sends in a step, from the config alone.

A matrix of r rows and c columns, m the smaller and n the larger of the two, takes 4 m^2 n + 2 m^3 FLOPs an iteration.
ZeRO 1 and 2 share the matrices of a stage out over the replicas, and ZeRO 0 lets each replica compute all. Every rank
of a tensor-parallel group computes the whole matrices that it has parts of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from torch import nn

from megachiar.config import RunConfig
from megachiar.model.dtypes import DTYPES
from megachiar.model.hidden_matrices import hidden_matrices
from megachiar.parallel.shard import shard_of

_ALIGNMENT = 2  # elements for each replica, to a multiple of which DeepSpeed pads what it cuts


@dataclass(frozen=True)
class MatrixShape:
    """A parameter that Muon trains: ``blocks`` matrices (rows, columns), of which a rank holds ``held`` elements."""

    rows: int
    columns: int
    blocks: int
    held: int


@dataclass(frozen=True)
class MuonCosts:
    """The costs of Muon for one rank.

    Attributes:
        parameters: number of the rank's parameters that Muon trains.
        flops: FLOPs of a step.
        tensor: bytes that the rank sends to its tensor-parallel group in a step.
        data: bytes that it sends to the other replicas in a step, beside gradients and weights.
        working: bytes of the rank's working memory in the optimizer's step, when no activations are held.
    """

    parameters: int
    flops: float
    tensor: float
    data: float
    working: float


NO_COSTS = MuonCosts(parameters=0, flops=0.0, tensor=0.0, data=0.0, working=0.0)


def matrix_shapes(layer: nn.Module, tensor_size: int) -> list[MatrixShape]:
    """Return the matrices of a layer, of which each tensor-parallel rank has its part."""
    shapes = []
    for matrix in hidden_matrices(layer):
        part, shard = matrix.parameter.shape, shard_of(matrix.parameter)
        rows, columns = part if shard is None else shard.whole_shape(part, tensor_size)
        shapes.append(MatrixShape(rows // matrix.blocks, columns, matrix.blocks, part.numel()))
    return shapes


def muon_costs(config: RunConfig, data_size: int, matrices: Sequence[MatrixShape]) -> MuonCosts:
    """Return the costs of Muon for a rank of a stage that has these matrices."""
    muon, tensor_size = config.optimizer.muon, config.parallel.tensor_size
    shares = data_size if config.parallel.zero_stage else 1
    width = DTYPES[muon.ns_dtype].itemsize
    flops = sum(shape.blocks * iteration_flops(shape.rows, shape.columns) for shape in matrices) * muon.ns_steps
    wholes = [(shape.blocks * shape.rows * shape.columns, shape.held) for shape in matrices]
    gathered = sum(whole for whole, held in wholes if held < whole)
    split = split_sizes([shape.held for shape in matrices], shares)
    return MuonCosts(
        parameters=sum(shape.held for shape in matrices),
        flops=flops / shares,
        tensor=gathered * width * (tensor_size - 1) / tensor_size / shares,
        data=2 * sum(split) * width * (data_size - 1) / data_size,
        working=width * (max(_working_elements(shape) for shape in matrices) + sum(sorted(split)[-2:])),
    )


def _working_elements(shape: MatrixShape) -> int:
    """Return how many numbers the update of a matrix takes: direction, two iterates and two Gram matrices.

    A tensor-parallel rank has its part of the direction beside the whole one.
    """
    whole = shape.blocks * shape.rows * shape.columns
    part = shape.held if shape.held < whole else 0
    return part + whole + 2 * shape.rows * shape.columns + 2 * min(shape.rows, shape.columns) ** 2


def iteration_flops(rows: int, columns: int) -> int:
    """Return the FLOPs of one Newton-Schulz iteration for a matrix."""
    m, n = sorted((rows, columns))
    return 4 * m * m * n + 2 * m**3


def split_sizes(sizes: Iterable[int], shares: int) -> list[int]:
    """Return those of the sizes whose elements, all in a row, are cut when the row is shared out evenly."""
    ends = list(accumulate(sizes, initial=0))
    unit = _ALIGNMENT * shares
    share = math.ceil(ends[-1] / unit) * unit // shares
    return [end - start for start, end in pairwise(ends) if start // share != (end - 1) // share]
