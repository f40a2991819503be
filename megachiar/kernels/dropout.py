"""Dropout whose mask is a function of keys: which sample, position, place in the model and column.

A mask then does not depend on how rows and columns are shared out over micro-batches and ranks, a resumed run needs no
generator's state, and a recomputed activation gets the mask it had.

    row key (64 bits)     of seed, sample and position; mixed with the site, 32 bits of it are taken
    column key (32 bits)  of the column's number in the whole matrix
    kept                  where a hash of (row key XOR column key) is at least p * 2^32

Shapes: n rows, m columns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from megachiar.kernels.hash import GOLDEN, mix64, wrap64

CHUNK = 2**16
"""Elements that are hashed at once: they and their 32-bit numbers stay in a core's cache."""


class KeyedDropout(NamedTuple):
    """Dropout of rows at one place of the model.

    Attributes:
        probability: of an element to become 0; the others are scaled by 1 / (1 - probability).
        keys: (n,) int64 of ``row_keys``.
        site: number of the place.
    """

    probability: float
    keys: torch.Tensor
    site: int


def row_keys(seed: int, samples: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Key of each row: int64, as ``samples`` and ``positions`` (int64) broadcast."""
    return mix64(mix64(samples + wrap64((seed + 1) * GOLDEN)) + positions * GOLDEN)


def dropout(x: torch.Tensor, how: KeyedDropout | None, first_column: int = 0) -> torch.Tensor:
    """``x`` (n, m) with elements dropped; ``x`` itself without ``how``.

    ``first_column`` is the number of x's first column in the whole matrix, where ranks share its columns.
    """
    if how is None or how.probability == 0:
        return x
    return _Dropout.apply(x, how, first_column)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, how, first_column):
        ctx.how, ctx.first_column = how, first_column
        return _dropped(x, how, first_column)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _dropped(gradient, ctx.how, ctx.first_column), None, None


def _dropped(x: torch.Tensor, how: KeyedDropout, first_column: int) -> torch.Tensor:
    rows, columns = site_keys(how), column_keys(first_column, x.shape[1], x.device)
    result, scale = torch.empty_like(x), 1 / (1 - how.probability)
    step = max(1, CHUNK // x.shape[1])
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        torch.mul(x[part], kept(rows[part, None], columns, how.probability), out=result[part]).mul_(scale)
    return result


def site_keys(how: KeyedDropout) -> torch.Tensor:
    """(n,) int32: the rows' keys at this place."""
    return (mix64(how.keys + wrap64(how.site * GOLDEN)) >> 32).int()


@lru_cache(maxsize=32)
def column_keys(first: int, count: int, device: torch.device) -> torch.Tensor:
    """(count,) int32: keys of columns ``first`` to ``first + count - 1``."""
    with torch.inference_mode(False):
        return (mix64((torch.arange(first, first + count, device=device) + 1) * GOLDEN) >> 32).int()


def kept(rows: torch.Tensor, columns: torch.Tensor, probability: float) -> torch.Tensor:
    """Mask, True where an element stays, of int32 keys as they broadcast."""
    number = rows ^ columns
    number *= 0x7FEB352D
    number ^= (number >> 15) & 0x1FFFF
    number *= -0x7B935975  # 0x846CA68B as int32
    return number >= int(probability * 2**32) - 2**31
