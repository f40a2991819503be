"""Linear layers over the ranks of a tensor-parallel group.

    ColumnParallelLinear   a rank has o / p of the outputs   all rows in, or the rank's rows with sequence parallelism
    RowParallelLinear      a rank has i / p of the inputs    the same rows out
    ReplicatedLinear       every rank has all of it          for the rank's own rows

Between a column-parallel and a row-parallel layer each rank works on all rows with its shard of the features. Outside
of the two, rows are whole on every rank or, with sequence parallelism, sharded. Rows that were gathered in the forward
pass are not kept: the backward pass gathers them once more.

Shapes: N = rows of a micro-batch, n = rows that are routed to an operator, i = inputs, o = outputs, p = ranks of the
group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from megachiar.parallel.collectives import (
    padded,
    reduce_or_scatter_output,
    replicated_parameter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megachiar.parallel.rows import IndexedRows, linear_of_rows
from megachiar.parallel.shard import Shard, sharded
from megachiar.topology import TensorParallelGroup


class ColumnParallelLinear(nn.Linear):
    """A part of an ``nn.Linear(i, o)``: this rank computes o / p outputs for all rows.

    Args:
        inputs, outputs: i and o of the whole layer.
        group: the ranks that share it.
        blocks: number of equal blocks of outputs that are each cut by themselves (keys and values: 2).
    """

    weight: nn.Parameter

    def __init__(self, inputs: int, outputs: int, group: TensorParallelGroup, blocks: int = 1):
        super().__init__(inputs, outputs // group.size)
        self.group = group
        self.blocks = blocks
        sharded(self.weight, Shard(0, blocks), group)
        sharded(self.bias, Shard(0, blocks), group)

    def forward(self, x: torch.Tensor, indexed: IndexedRows | None = None) -> torch.Tensor:
        """Compute (N, o / p) of all rows.

        Args:
            x: (N, i), or this rank's block (N / p, i) with sequence parallelism.
            indexed: where the rows of ``x`` come from, as in ``linear_of_rows``; used on one rank alone.
        """
        if self.group.size == 1:
            return linear_of_rows(x, self.weight, self.bias, indexed)
        return _ColumnParallel.apply(x, None, 0, self.group, self.weight, self.bias)


class RowParallelLinear(nn.Linear):
    """A part of an ``nn.Linear(i, o)``: this rank has i / p inputs, and the ranks' addends are summed."""

    weight: nn.Parameter

    def __init__(self, inputs: int, outputs: int, group: TensorParallelGroup):
        super().__init__(inputs // group.size, outputs)
        self.group = group
        sharded(self.weight, Shard(1), group)

    def forward(self, x: torch.Tensor, counts_per_rank: Sequence[int] | None = None) -> torch.Tensor:
        """Compute (n, o) of all rows, or with sequence parallelism those that this rank owns.

        Args:
            x: (n, i / p), this rank's features of all rows.
            counts_per_rank: how many of the n rows each rank owns, as in ``reduce_or_scatter_output``.
        """
        if self.group.size == 1:
            return linear_of_rows(x, self.weight, self.bias)
        output = reduce_or_scatter_output(F.linear(x, self.weight), self.group, counts_per_rank)
        return output + replicated_parameter(self.bias, self.group)


class ReplicatedLinear(nn.Linear):
    """An ``nn.Linear(i, o)`` that is whole on every rank, for the rows that a rank has."""

    weight: nn.Parameter

    def __init__(self, inputs: int, outputs: int, group: TensorParallelGroup):
        super().__init__(inputs, outputs)
        self.group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (m, o) of this rank's rows (m, i)."""
        return F.linear(x, replicated_parameter(self.weight, self.group), replicated_parameter(self.bias, self.group))


def query_key_value(
    x: torch.Tensor, rows: torch.Tensor | None, query: ColumnParallelLinear, key_value: ColumnParallelLinear
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute queries of the routed rows, and keys and values of all rows, from one all-gather of the rows.

    Args:
        x: (N, i), or this rank's block (N / p, i) with sequence parallelism.
        rows: indices (n,) int64 of the routed rows among all N; None if all are routed.
        query, key_value: layers of the same group, which has more than one rank.

    Returns:
        Queries (n, o / p), and keys and values (N, 2 o / p).
    """
    parameters = query.weight, query.bias, key_value.weight, key_value.bias
    return _ColumnParallel.apply(x, rows, 1, query.group, *parameters)


def query_key_value_of_routed(
    routed: torch.Tensor,
    counts_per_rank: Sequence[int] | None,
    query: ColumnParallelLinear,
    key_value: ColumnParallelLinear,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute queries, keys and values of the routed rows alone: no other row is sent.

    Args:
        routed: (n, i), or with sequence parallelism the routed rows that this rank owns.
        counts_per_rank: how many of the n rows each rank owns with sequence parallelism, in the order of the ranks;
            else None.
        query, key_value: layers of the same group, which has more than one rank.

    Returns:
        Queries (n, o / p), and keys and values (n, 2 o / p).
    """
    rows = None
    if counts_per_rank is not None and len(set(counts_per_rank)) > 1:  # collectives take blocks of one size
        widest = max(counts_per_rank)
        routed = padded(routed, widest)
        valid = [
            torch.arange(count, device=routed.device) + rank * widest for rank, count in enumerate(counts_per_rank)
        ]
        rows = torch.cat(valid)
    parameters = query.weight, query.bias, key_value.weight, key_value.bias
    return _ColumnParallel.apply(routed, rows, 2, query.group, *parameters)


class _ColumnParallel(torch.autograd.Function):
    """Products of all rows with this rank's shard of one or two weights.

    The first ``routed_products`` of the products are for routed rows alone. With sequence parallelism rows are gathered
    in both passes, and the gradient's sum is scattered while the gradients of the weights are computed.
    """

    @staticmethod
    def forward(ctx, x, rows, routed_products, group, *weights_and_biases):
        weights, biases = weights_and_biases[::2], weights_and_biases[1::2]
        ctx.group, ctx.routed_products = group, routed_products if rows is not None else 0
        ctx.save_for_backward(x, rows, *weights)
        whole = start_all_gather(x, group).wait_for() if group.sequence else x
        results = tuple(
            F.linear(whole.index_select(0, rows) if i < ctx.routed_products else whole, weight, bias)
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True))
        )
        return results[0] if len(results) == 1 else results

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        x, rows, *weights = ctx.saved_tensors
        group = ctx.group
        gathering = start_all_gather(x, group) if group.sequence else None
        of_products = [gradient @ weight for gradient, weight in zip(gradients, weights, strict=True)]
        of_whole = sum(of_products[ctx.routed_products :])
        if ctx.routed_products:
            if not torch.is_tensor(of_whole):
                of_whole = x.new_zeros(len(x) * (group.size if group.sequence else 1), x.shape[1])
            of_whole.index_add_(0, rows, sum(of_products[: ctx.routed_products]))
        whole = gathering.wait_for() if gathering is not None else x
        routed = whole.index_select(0, rows) if ctx.routed_products else None
        start_reduction = start_reduce_scatter if group.sequence else start_all_reduce
        reducing = start_reduction(of_whole, group)
        of_parameters = []
        for i, gradient in enumerate(gradients):
            of_parameters += [gradient.mT @ (routed if i < ctx.routed_products else whole), gradient.sum(0)]
        return reducing.wait_for(), None, None, None, *of_parameters
