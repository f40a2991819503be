"""Where this process stands among the others: a value that is passed down, no module globals."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megachiar.config import RunConfig
from megachiar.errors import UserError


@dataclass(frozen=True)
class Topology:
    """The pp x dp x tp grid and this process's place in it.

    Attributes:
        rank, world_size: over all processes.
        local_rank, local_world_size: over the processes of this machine.
        data_rank, data_size: among data-parallel replicas.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    data_rank: int
    data_size: int

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


class LaunchError(UserError):
    """The ranks that were started do not fit the config: the same on every rank."""

    same_on_every_rank = True


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
    if config.parallel.pipeline_size * config.parallel.tensor_size > 1:
        raise LaunchError(
            "parallel",
            "this version trains data-parallel with ZeRO; pipeline_size and tensor_size above 1 only plan (--dry-run)",
            "set both to 1 and use zero_stage 2 or 3 to save memory",
        )
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        data_rank=rank,
        data_size=data_size,
    )
