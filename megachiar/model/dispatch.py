"""Which rows take which operator, on this rank and on all ranks of its tensor group.

Shapes: N = rows of the micro-batch, m = this rank's rows (N, or N / p with sequence parallelism), O = operators.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megachiar.model.batch_layout import BatchLayout
from megachiar.parallel.collectives import all_gather, first_rank_says


@dataclass(frozen=True)
class Choice:
    """The rows of one operator.

    Attributes:
        rows: their numbers (n,) among all N, ascending.
        counts: how many of them each rank owns, with sequence parallelism; else None.
        own: the numbers of this rank's ones among its m rows, ascending.
    """

    rows: torch.Tensor
    counts: list[int] | None
    own: torch.Tensor


@dataclass(frozen=True)
class Sorted:
    """This rank's rows, sorted by operator: the last operator's lead, rows of one operator keep their order.

    Attributes:
        order: (m,) indices that sort.
        choices: of each operator, in the order of the sorted rows.
        sizes: how many of this rank's rows each has, in the same order.
    """

    order: torch.Tensor
    choices: list[Choice]
    sizes: list[int]


def agree(operator: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
    """The routes (N,) of all rows, the same on every rank, from this rank's (m,) int64: one byte a row is sent.

    Sharded rows are decided by their owner. Rows that every rank has are decided by the first one: a rounding that
    differs between machines must not send a token two ways.
    """
    if layout.group.size == 1:
        return operator
    said = operator.to(torch.uint8)
    said = all_gather(said, layout.group) if layout.group.sequence else first_rank_says(said, layout.group)
    return said.long()


def sort_rows(operator: torch.Tensor, operators: int, layout: BatchLayout) -> Sorted:
    """Sort by the routes (N,) of all rows. How many each operator has is what the host waits for, once a layer."""
    if not layout.group.shards_rows:
        found = [torch.nonzero(operator == o).flatten() for o in reversed(range(operators))]
        return Sorted(torch.cat(found), [Choice(rows, None, rows) for rows in found], [len(rows) for rows in found])
    by_rank, me = operator.view(layout.group.size, -1), layout.group.rank
    order = torch.argsort(by_rank[me], descending=True, stable=True)
    counts = torch.stack([(by_rank == o).sum(1) for o in reversed(range(operators))]).tolist()  # the one copy to host
    sizes = [of_operator[me] for of_operator in counts]
    choices, start = [], 0
    for index, of_operator in enumerate(counts):
        own = order[start : start + sizes[index]]
        start += sizes[index]
        rows = torch.nonzero_static(operator == operators - 1 - index, size=sum(of_operator)).flatten()
        choices.append(Choice(rows, of_operator, own))
    return Sorted(order, choices, sizes)
