"""Compare, while a run trains, what its ranks must hold alike, and stop before a difference reaches a checkpoint.

    weights and buffers     the data-parallel replicas of a rank hold the same (under ZeRO 3: the small ones)
    replicated weights      the ranks of a tensor-parallel group hold the same, or the same shard of it
    tied weights            the first and the last pipeline stage hold the same
    routes                  the ranks of a tensor-parallel group sent each token of the last micro-batch the same way
    samples                 the ranks of one replica have read the same samples in the last step

Each rank sends eight 64-bit digests; only where they differ do ranks send one for each tensor. Memory errors, a faulty
link or host and defects of this program differ on one rank. Weights of which ZeRO keeps one copy have none to compare.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megachiar.engine.engine import Engine
from megachiar.engine.weight_digests import Sharing, digest, held_tensors
from megachiar.kernels.hash import wrap64
from megachiar.topology import LaunchError, Topology
from megachiar.training.odd_ranks import describe_ranks, odd_groups


class Coordinates(NamedTuple):
    """The place of a rank in the grid of pipeline stages, data-parallel replicas and tensor-parallel ranks."""

    pipeline: int
    data: int
    tensor: int


_Groups = dict[Hashable, list[int]]
"""The ranks that must hold the same tensors, by what these groups have in common."""


def compare_ranks(engine: Engine, step: int, samples: int) -> None:
    """Check that the ranks hold the same where they must; every rank calls this function.

    Args:
        engine: of this rank.
        step: optimizer steps taken, for messages.
        samples: digest of the samples that this rank has read in the last step.

    Raises:
        LaunchError: ranks differ. The message names the first tensor that differs and the ranks.
    """
    topology = engine.topology
    if topology.world_size == 1:
        return
    digests = [(tensor.name, tensor.sharing, digest(tensor.value)) for tensor in held_tensors(engine)]
    if topology.is_first_stage or topology.is_last_stage:
        read = torch.tensor(wrap64(samples), device=engine.device)
        digests.append(("samples of the last step", Sharing(False, True, True), read))
    mine = [_combine(d for _, sharing, d in digests if sharing == kind) for kind in _KINDS]
    table = _gather_numbers(engine, mine)
    for column, kind in enumerate(_KINDS):
        groups = _groups(kind, topology)
        if any(_odd_ranks([row[column] for row in table], groups)):
            raise _name_tensor({name: int(d) for name, sharing, d in digests if sharing == kind}, groups, step)


_KINDS = [Sharing(*flags) for flags in itertools.product((False, True), repeat=3)]


def _groups(kind: Sharing, topology: Topology) -> _Groups:
    """Return the groups of ranks that must hold the same tensors of a kind."""
    groups: _Groups = {}
    for rank in range(topology.world_size):
        place = coordinates(rank, topology)
        if kind.over_ends and place.pipeline not in (0, topology.pipeline_size - 1):
            continue
        key = (
            None if kind.over_ends else place.pipeline,
            None if kind.over_data else place.data,
            None if kind.over_tensor else place.tensor,
        )
        groups.setdefault(key, []).append(rank)
    return groups


def coordinates(rank: int, topology: Topology) -> Coordinates:
    """Return the place of ``rank``, as ``Topology`` numbers the ranks."""
    rest, tensor = divmod(rank, topology.tensor.size)
    return Coordinates(*divmod(rest, topology.data_size), tensor)


def _combine(digests: Iterator[torch.Tensor]) -> int:
    """Return one digest of several, in their order; the host waits here for the device."""
    found = list(digests)
    return int(digest(torch.stack(found))) if found else 0


def _gather_numbers(engine: Engine, numbers: list[int]) -> list[list[int]]:
    """Return the int64 ``numbers`` of every rank, by rank; every rank calls this function."""
    mine = torch.tensor(numbers, dtype=torch.int64)
    gathered = [torch.empty_like(mine) for _ in range(engine.topology.world_size)]
    dist.all_gather(gathered, mine, group=engine.control)
    return [row.tolist() for row in gathered]


def _odd_ranks(numbers: list[int], groups: _Groups) -> Iterator[tuple[list[int], list[int]]]:
    """Yield, of each group whose ranks have different numbers, those that differ from the most, and the others."""
    for ranks in groups.values():
        odd, (_, usual) = odd_groups([numbers[rank] for rank in ranks])
        if odd:
            yield sorted(ranks[index] for _, indices in odd for index in indices), [ranks[index] for index in usual]


def _name_tensor(mine: dict[str, int], groups: _Groups, step: int) -> LaunchError:
    """Return the error that names the first tensor that differs; every rank calls this function.

    Args:
        mine: digests of this rank's tensors by name.
        groups: of the ranks that must have the same ones.
        step: optimizer steps taken.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), mine))
    hosts, digests = zip(*everyone, strict=True)
    for name in dict.fromkeys(name for of_rank in digests for name in of_rank):
        for odd, others in _odd_ranks([of_rank.get(name, 0) for of_rank in digests], groups):
            return _difference(
                name,
                describe_ranks(odd, hosts),
                describe_ranks(others, hosts),
                step,
                is_even=len(odd) >= len(others),
            )
    raise AssertionError("digests of all tensors together differ, and those of each tensor do not")


def _difference(name: str, odd: str, others: str, step: int, is_even: bool) -> LaunchError:
    doubt = "; with as many on either side, either may be the one in error" if is_even else ""
    return LaunchError(
        f"after step {step}: {name}",
        f"differs on {odd} from {others}, which must hold the same{doubt}",
        "nothing was saved since; start the run again, which continues from its last checkpoint. If the same rank "
        "differs again, leave its host or GPU out",
    )
