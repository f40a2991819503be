"""The partition of rows by their route in one Triton kernel.

Each program counts by itself the attention rows before its own ones: the scores of all rows are read from the caches
many times, and no program waits for another.

Shapes: B = sequences, N = rows.
"""

from __future__ import annotations

import torch

from megachiar.kernels.gpu import INTERPRETED, jit, launch_options, tl, triton

ROWS = 16 if INTERPRETED else 512
"""The rows that a program puts in their places."""
COUNTED = 32 if INTERPRETED else 4096
"""The rows that a program counts at once."""


def partition(
    score: torch.Tensor, threshold: torch.Tensor, sequences: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return routes, order, numbers before and starts, as in ``partition.Partition``.

    Args:
        score: (N,) of any type.
        threshold: (1,), what they are compared with.
        sequences: B, above 0.
    """
    score = score.contiguous()
    n = len(score)
    routes = torch.empty(n, dtype=torch.int64, device=score.device)
    order, before, starts = (
        torch.empty(size, dtype=torch.int32, device=score.device) for size in (n, n + 1, sequences + 1)
    )
    _partition[(triton.cdiv(n, ROWS),)](
        score,
        threshold,
        routes,
        order,
        before,
        starts,
        n,
        n // sequences,
        ROWS=ROWS,
        COUNTED=COUNTED,
        **launch_options(8),
    )
    return routes, order, before, starts


def _kernel(score, threshold, routes, order, before, starts, n, length, ROWS: tl.constexpr, COUNTED: tl.constexpr):
    bound = tl.load(threshold)
    first = tl.program_id(0) * ROWS
    all_counts = tl.zeros((COUNTED,), tl.int32)
    earlier_counts = tl.zeros((COUNTED,), tl.int32)
    for start in range(0, n, COUNTED):
        row = start + tl.arange(0, COUNTED)
        attends = ((tl.load(score + row, mask=row < n, other=0) > bound) & (row < n)).to(tl.int32)
        all_counts += attends
        earlier_counts += tl.where(row < first, attends, 0)
    count = tl.sum(all_counts, 0)
    row = first + tl.arange(0, ROWS)
    attends = ((tl.load(score + row, mask=row < n, other=0) > bound) & (row < n)).to(tl.int32)
    number = tl.sum(earlier_counts, 0) + tl.cumsum(attends, 0) - attends
    place = tl.where(attends > 0, number, count + row - number)
    tl.store(routes + row, attends.to(tl.int64), mask=row < n)
    tl.store(order + place, row, mask=row < n)
    tl.store(before + row, number, mask=row < n)
    tl.store(starts + row // length, number, mask=(row < n) & (row % length == 0))
    if tl.program_id(0) == 0:
        tl.store(before + n, count)
        tl.store(starts + n // length, count)


_partition = jit(_kernel)
