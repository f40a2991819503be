"""Where this process stands among the others: a value that is passed down, no module globals."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megachiar.config import RunConfig
from megachiar.errors import UserError


@dataclass(frozen=True)
class TensorParallelGroup:
    """The ranks that share each layer's matrices, as layers see them.

    Attributes:
        rank, size: of this process among them.
        sequence: rows outside attention and feed-forward are sharded over them (sequence parallelism).
        handle: process group; None where ``size`` is 1.
    """

    rank: int = 0
    size: int = 1
    sequence: bool = False
    handle: dist.ProcessGroup | None = None

    @property
    def shards_rows(self) -> bool:
        """Whether this rank holds a block of a micro-batch's rows instead of all of them."""
        return self.sequence and self.size > 1


SINGLE_RANK = TensorParallelGroup()
"""The group of a model on one rank."""


@dataclass(frozen=True)
class Topology:
    """The pp x dp x tp grid and this process's place in it.

    Ranks are numbered ``(pipeline_rank * dp + data_rank) * tp + tensor_rank``: the ranks of a tensor group, which talk
    most, are neighbours on one node.

    Attributes:
        rank, world_size: over all processes.
        local_rank: over the processes of this machine.
        pipeline_rank, pipeline_size: stages.
        data_rank, data_size: data-parallel replicas.
        tensor: the ranks that share this rank's layers; its ``handle`` is None until ``with_groups``.
        data_group: process group of one shard's replicas (dp); None until ``with_groups``.
    """

    rank: int
    world_size: int
    local_rank: int
    data_rank: int
    data_size: int
    pipeline_rank: int = 0
    pipeline_size: int = 1
    tensor: TensorParallelGroup = SINGLE_RANK
    data_group: dist.ProcessGroup | None = None

    @property
    def model_size(self) -> int:
        """Ranks that share one replica of the model: pp x tp."""
        return self.pipeline_size * self.tensor.size

    def describe(self) -> str:
        """In words, for logs and records."""
        rows = " with sequence parallelism" if self.tensor.shards_rows else ""
        return f"pp {self.pipeline_size} x tp {self.tensor.size}{rows} x dp {self.data_size}"

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1

    def with_groups(self) -> Topology:
        """The same place with its process groups; every rank calls it, after the default group has started."""
        grid = torch.arange(self.world_size).view(self.pipeline_size, self.data_size, self.tensor.size)
        tensor = _own_group(grid.flatten(0, 1), self.rank)
        data = _own_group(grid.transpose(1, 2).flatten(0, 1), self.rank)
        return replace(self, tensor=replace(self.tensor, handle=tensor), data_group=data)


def _own_group(groups: torch.Tensor, rank: int) -> dist.ProcessGroup:
    """Of process groups (number of groups, ranks each) the one that ``rank`` is in; all ranks make all of them."""
    handles = {tuple(ranks): dist.new_group(ranks) for ranks in groups.tolist()}
    return next(handle for ranks, handle in handles.items() if rank in ranks)


class LaunchError(UserError):
    """The ranks that were started do not fit the config: the same on every rank."""

    same_on_every_rank = True


def raise_together(error: UserError | None) -> None:
    """Raise on every rank what a rank met; every rank calls it, with None where it met nothing.

    Raises:
        LaunchError: the error of the first such rank, which it names with its host unless all met the same.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), error))
    met = [(rank, host, found) for rank, (host, found) in enumerate(everyone) if found is not None]
    if not met:
        return
    rank, host, first = met[0]
    alike = len({str(found) for _, _, found in met}) == 1 and len(met) == len(everyone)
    others = f" (and {len(met) - 1} more)" if len(met) > 1 else ""
    where = first.where if alike else f"rank {rank} on {host}{others}: {first.where}"
    raise LaunchError(where, first.problem, first.remedy) from error


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Replicas that ``world_size`` ranks make under ``config``.

    Raises:
        LaunchError: the ranks do not divide into replicas, or the batch does not divide over them.
    """
    parallel, training = config.parallel, config.training
    replica = parallel.pipeline_size * parallel.tensor_size
    if world_size % replica:
        raise LaunchError(
            "parallel",
            f"{world_size} ranks are no multiple of pipeline_size {parallel.pipeline_size} * "
            f"tensor_size {parallel.tensor_size}",
            f"start a multiple of {replica} ranks",
        )
    data_size = world_size // replica
    if parallel.data_size not in (None, data_size):
        raise LaunchError(
            "parallel.data_size",
            f"is {parallel.data_size}, but {world_size} ranks make {data_size} replicas",
            f"start {parallel.data_size * replica} ranks, or leave data_size out",
        )
    unit = training.micro_batch_size * data_size
    if training.global_batch_size % unit:
        raise LaunchError(
            "training.global_batch_size",
            f"{training.global_batch_size} is no multiple of micro_batch_size {training.micro_batch_size} * "
            f"{data_size} data-parallel ranks",
            f"use a multiple of {unit}, or another number of ranks",
        )
    return data_size


def build_topology(config: RunConfig) -> Topology:
    """The place of this process, from the environment that ``launch.prepare_environment`` made."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    data_size = data_parallel_size(config, world_size)
    parallel = config.parallel
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        data_rank=rank // parallel.tensor_size % data_size,
        data_size=data_size,
        pipeline_rank=rank // (parallel.tensor_size * data_size),
        pipeline_size=parallel.pipeline_size,
        tensor=TensorParallelGroup(rank % parallel.tensor_size, parallel.tensor_size, parallel.sequence),
    )
