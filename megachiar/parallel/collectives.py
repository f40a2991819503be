"""Collectives over a tensor-parallel group, each with its backward pass.

    function              forward          backward
    copy_to_tp_group      -                all-reduce       into a computation that each rank does for its shard
    reduce_from_tp_group  all-reduce       -                out of such a computation
    all_gather_rows       all-gather       reduce-scatter   into it, where rows are sharded outside of it
    reduce_scatter_rows   reduce-scatter   all-gather       out of it, where rows are sharded outside of it
    replicated_parameter  -                all-reduce       a whole parameter that each rank uses for its own rows

``gather_or_copy_input`` (Megatron's f) and ``reduce_or_scatter_output`` (its g) choose between the first two pairs.
Groups of one rank communicate nothing.

Shapes: N = rows of a micro-batch, n = rows that are routed to an operator, d = channels, p = ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megachiar.topology import TensorParallelGroup


def gather_or_copy_input(x: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Return all rows (N, d), for a computation that each rank does for its shard of the features.

    ``x`` are all rows, or with sequence parallelism this rank's block (N / p, d).
    """
    if group.size == 1:
        return x
    return all_gather_rows(x, group) if group.sequence else copy_to_tp_group(x, group)


def reduce_or_scatter_output(
    partial: torch.Tensor, group: TensorParallelGroup, counts_per_rank: Sequence[int] | None = None
) -> torch.Tensor:
    """Sum the ranks' partial results, and return all rows or with sequence parallelism those that this rank owns.

    Args:
        partial: (n, d), this rank's addend of all n rows.
        group: the ranks.
        counts_per_rank: how many of the n rows each rank owns with sequence parallelism, in the order of the ranks;
            n / p each if None.

    Returns:
        (n, d), or with sequence parallelism the rows that this rank owns.
    """
    if group.size == 1:
        return partial
    if not group.sequence:
        return reduce_from_tp_group(partial, group)
    if counts_per_rank is None or len(set(counts_per_rank)) == 1:
        return reduce_scatter_rows(partial, group)
    # Collectives take blocks of one size: each rank's block is padded to the widest.
    widest = max(counts_per_rank)
    blocks = torch.cat([padded(block, widest) for block in partial.split(list(counts_per_rank))])
    return reduce_scatter_rows(blocks, group)[: counts_per_rank[group.rank]]


def copy_to_tp_group(x: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Return ``x``, whose gradient is summed over the ranks."""
    return _Copy.apply(x, group)


def reduce_from_tp_group(x: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Sum ``x`` over the ranks; each rank's ``x`` gets the whole gradient."""
    return x if group.size == 1 else _Reduce.apply(x, group)


def all_gather_rows(x: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Gather the blocks (N / p, ...) of all ranks, one after another, into (N, ...)."""
    return x if group.size == 1 else _AllGather.apply(x, group)


def reduce_scatter_rows(x: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Sum the ranks' ``x`` (N, ...) and return this rank's block (N / p, ...) of the sum."""
    return _ReduceScatter.apply(x, group)


def replicated_parameter(parameter: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Return ``parameter``; its gradient is summed over the ranks where each of them uses it for its own rows alone."""
    return copy_to_tp_group(parameter, group) if group.shards_rows else parameter


def all_reduce(x: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Sum ``x`` over the ranks, without gradient and into a new tensor."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group.handle)
    return total


def all_gather(x: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Gather the blocks of all ranks along the first dimension, without gradient."""
    return start_all_gather(x, group).wait_for()


def broadcast_from_first_rank(x: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Return the first rank's ``x`` on every rank, without gradient."""
    received = x.clone(memory_format=torch.contiguous_format)
    dist.broadcast(received, group=group.handle, group_src=0)
    return received


class Pending:
    """The result of a collective that runs while this rank computes something else."""

    def __init__(self, work: dist.Work, result: torch.Tensor):
        self._work = work
        self._result = result

    def wait_for(self) -> torch.Tensor:
        """Wait until the collective is done, and return its result."""
        self._work.wait()
        return self._result


def start_all_gather(x: torch.Tensor, group: TensorParallelGroup) -> Pending:
    """Start to gather the blocks (N / p, ...) of all ranks into (N, ...)."""
    x = x.contiguous()
    whole = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    return Pending(dist.all_gather_into_tensor(whole, x, group=group.handle, async_op=True), whole)


def start_reduce_scatter(x: torch.Tensor, group: TensorParallelGroup) -> Pending:
    """Start to sum the ranks' ``x`` (N, ...); this rank gets its block (N / p, ...) of the sum."""
    x = x.contiguous()
    block = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
    return Pending(dist.reduce_scatter_tensor(block, x, group=group.handle, async_op=True), block)


def start_all_reduce(x: torch.Tensor, group: TensorParallelGroup) -> Pending:
    """Start to sum ``x`` over the ranks; a contiguous ``x`` becomes the sum itself."""
    x = x.contiguous()
    return Pending(dist.all_reduce(x, group=group.handle, async_op=True), x)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx, gradient):
        return start_reduce_scatter(gradient, ctx.group).wait_for(), None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return start_reduce_scatter(x, group).wait_for()

    @staticmethod
    def backward(ctx, gradient):
        return all_gather(gradient, ctx.group), None


def padded(block: torch.Tensor, rows: int) -> torch.Tensor:
    """Return ``block`` (n, ...) with zeros after its rows: (rows, ...)."""
    return torch.cat([block, block.new_zeros(rows - len(block), *block.shape[1:])])
