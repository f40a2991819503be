"""Dispatch: which rows take which operator, on this rank and on all ranks of its tensor-parallel group.

Shapes: N = rows of the micro-batch, m = this rank's rows (N, or N / p with sequence parallelism), n = rows of one
operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megachiar.model.batch_layout import BatchLayout
from megachiar.parallel.collectives import all_gather, broadcast_from_first_rank


@dataclass(frozen=True)
class OperatorTokens:
    """The tokens that are routed to one operator, by the indices of their rows.

    Attributes:
        indices: (n,) int64, their indices among all N rows, ascending.
        counts_per_rank: how many of them each rank owns, in the order of the ranks; None without sequence parallelism.
        local_indices: int64, the indices of this rank's ones among its m rows, ascending.
    """

    indices: torch.Tensor
    counts_per_rank: list[int] | None
    local_indices: torch.Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """How this rank's rows are permuted into operator order: the last operator's rows lead, and rows of one operator
    keep their order.

    Attributes:
        permutation: (m,) int64, the row at each index of the operator order.
        operators: the tokens of each operator, in operator order.
        local_counts: how many of this rank's rows each operator has, in operator order.
    """

    permutation: torch.Tensor
    operators: list[OperatorTokens]
    local_counts: list[int]


FEW_ROWS = 64
"""Rows that a CPU sorts faster in a list than in tensors: those of a step of decoding."""


def join_tokens(parts: list[OperatorTokens]) -> OperatorTokens:
    """Return the tokens of several operators together."""
    if len(parts) == 1:
        return parts[0]
    counts = [part.counts_per_rank for part in parts if part.counts_per_rank is not None]
    return OperatorTokens(
        indices=torch.cat([part.indices for part in parts]).sort().values,
        counts_per_rank=[sum(of_rank) for of_rank in zip(*counts, strict=True)] if counts else None,
        local_indices=torch.cat([part.local_indices for part in parts]).sort().values,
    )


def synchronize_routes(operator: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
    """Return the routes (N,) of all rows, the same on every rank, from this rank's routes (m,) int64.

    The owner of a sharded row decides its route. Where every rank has all rows, the first rank decides: a rounding that
    differs between machines must not send a token two ways. Ranks send one byte a row.
    """
    if layout.group.size == 1:
        return operator
    routes = operator.to(torch.uint8)
    if layout.group.sequence:
        return all_gather(routes, layout.group).long()
    return broadcast_from_first_rank(routes, layout.group).long()


def _found_on_host(operator: torch.Tensor, operators: int) -> list[torch.Tensor]:
    """Return the indices of the rows of each operator, the last operator's first, from routes (N,) on the CPU."""
    found: list[list[int]] = [[] for _ in range(operators)]
    for row, o in enumerate(operator.tolist()):
        found[operators - 1 - o].append(row)
    return [torch.tensor(rows, dtype=torch.int64) for rows in found]


def plan_dispatch(operator: torch.Tensor, operators: int, layout: BatchLayout) -> DispatchPlan:
    """Plan the dispatch from the routes (N,) int64 of all rows to operators 0 to ``operators - 1``.

    The host waits here for the number of rows that each operator has, once a layer.
    """
    if not layout.group.shards_rows:
        if operator.device.type == "cpu" and len(operator) <= FEW_ROWS:
            found = _found_on_host(operator, operators)
        else:
            found = [torch.nonzero(operator == o).flatten() for o in reversed(range(operators))]
        of_all = [indices for indices in found if len(indices) == len(operator)]
        return DispatchPlan(
            permutation=of_all[0] if of_all else torch.cat(found),
            operators=[OperatorTokens(indices, None, indices) for indices in found],
            local_counts=[len(indices) for indices in found],
        )
    by_rank, me = operator.view(layout.group.size, -1), layout.group.rank
    permutation = torch.argsort(by_rank[me], descending=True, stable=True)
    # The one copy to the host.
    counts = torch.stack([(by_rank == o).sum(1) for o in reversed(range(operators))]).tolist()
    local_counts = [of_operator[me] for of_operator in counts]
    planned, start = [], 0
    for index, of_operator in enumerate(counts):
        local_indices = permutation[start : start + local_counts[index]]
        start += local_counts[index]
        indices = torch.nonzero_static(operator == operators - 1 - index, size=sum(of_operator)).flatten()
        planned.append(OperatorTokens(indices, of_operator, local_indices))
    return DispatchPlan(permutation, planned, local_counts)
