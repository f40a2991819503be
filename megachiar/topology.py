"""The position of this process among the ranks of a run. It is a value that is passed on, never a module global."""

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
    """The tensor-parallel group of this process: the ranks that share each layer's matrices.

    Attributes:
        rank: number of this process in the group.
        size: number of ranks in the group.
        sequence: whether rows outside attention and feed-forward are sharded over the group (sequence parallelism).
        handle: torch's process group; None where ``size`` is 1.
    """

    rank: int = 0
    size: int = 1
    sequence: bool = False
    handle: dist.ProcessGroup | None = None

    @property
    def shards_rows(self) -> bool:
        """Return whether this rank holds a block of a micro-batch's rows instead of all of them."""
        return self.sequence and self.size > 1


SINGLE_RANK = TensorParallelGroup()
"""The tensor-parallel group of a model whose layers are not sharded."""


@dataclass(frozen=True)
class Topology:
    """The pp x dp x tp grid of ranks, and the coordinates of this process in it.

    Ranks are numbered ``(pipeline_rank * dp + data_rank) * tp + tensor_rank``. The ranks of a tensor-parallel group,
    which communicate most, are therefore neighbours on one node.

    Attributes:
        rank: number of this process among all processes of the run.
        world_size: number of processes of the run.
        local_rank: number of this process among those of its machine.
        data_rank: number of this rank's data-parallel replica.
        data_size: number of data-parallel replicas.
        pipeline_rank: number of this rank's pipeline stage.
        pipeline_size: number of pipeline stages.
        tensor: the tensor-parallel group of this rank; its ``handle`` is None until ``with_groups``.
        data_group: process group of the ranks that hold the same shard in each replica; None until ``with_groups``.
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
        """Return the number of ranks that share one replica of the model: pp x tp."""
        return self.pipeline_size * self.tensor.size

    def describe(self) -> str:
        """Describe the layout in words, for logs and records."""
        rows = " with sequence parallelism" if self.tensor.shards_rows else ""
        return f"pp {self.pipeline_size} x tp {self.tensor.size}{rows} x dp {self.data_size}"

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, which alone writes logs and records."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Return whether this rank is on the pipeline stage of the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Return whether this rank is on the pipeline stage of the loss."""
        return self.pipeline_rank == self.pipeline_size - 1

    def with_groups(self) -> Topology:
        """Return the same topology with process groups. All ranks call it, after the default group has started."""
        grid = torch.arange(self.world_size).view(self.pipeline_size, self.data_size, self.tensor.size)
        tensor = _group_of(self.rank, grid.flatten(0, 1))
        data = _group_of(self.rank, grid.transpose(1, 2).flatten(0, 1))
        return replace(self, tensor=replace(self.tensor, handle=tensor), data_group=data)


def _group_of(rank: int, groups: torch.Tensor) -> dist.ProcessGroup:
    """Make process groups from their ranks, (groups, ranks of each), and return the one that ``rank`` is in.

    All ranks call it with the same groups.
    """
    handles = {tuple(ranks): dist.new_group(ranks) for ranks in groups.tolist()}
    return next(handle for ranks, handle in handles.items() if rank in ranks)


class LaunchError(UserError):
    """An error that every rank of a run meets alike, such as a number of ranks that does not fit the config."""

    same_on_every_rank = True


def raise_together(error: UserError | None) -> None:
    """Raise the error of any rank on every rank. All ranks call it, with None where there was no error.

    Raises:
        LaunchError: see ``shared_error``.
    """
    shared = shared_error(error)
    if shared is not None:
        raise shared from error


def shared_error(error: UserError | None) -> LaunchError | None:
    """Return the error of the first rank that has one, on every rank. All ranks call it, with None for no error.

    Unless all ranks have the same error, the message names that rank and its host.
    """
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (socket.gethostname(), error))
    failures = [(rank, host, raised) for rank, (host, raised) in enumerate(reports) if raised is not None]
    if not failures:
        return None
    rank, host, first = failures[0]
    is_same_everywhere = len(failures) == len(reports) and len({str(raised) for _, _, raised in failures}) == 1
    others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    where = first.where if is_same_everywhere else f"rank {rank} on {host}{others}: {first.where}"
    return LaunchError(where, first.problem, first.remedy)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Return the number of data-parallel replicas that ``world_size`` ranks make under ``config``.

    Raises:
        LaunchError: the ranks cannot be divided into replicas, or the batch cannot be divided over the replicas.
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
    for name, task in config.mixed.tasks.items():
        if task.global_batch_size % unit:
            raise LaunchError(
                f"mixed.tasks.{name}.global_batch_size",
                f"{task.global_batch_size} is no multiple of micro_batch_size {training.micro_batch_size} * "
                f"{data_size} data-parallel ranks",
                f"use a multiple of {unit}, or another number of ranks",
            )
    return data_size


def build_topology(config: RunConfig) -> Topology:
    """Return the topology of this process, from the variables that ``launch.prepare_environment`` has set."""
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
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
        tensor=TensorParallelGroup(
            rank=rank % parallel.tensor_size,
            size=parallel.tensor_size,
            sequence=parallel.sequence,
        ),
    )
