"""Dropout whose mask is a function of keys: of the sample, the position, the site in the model and the column.

A mask then does not depend on how rows and columns are distributed over micro-batches and ranks. A resumed run needs no
state of a generator, and a recomputed activation gets the mask that it had.

    row key (64 bits)      mix64 of seed, sample and position; mixed once more with the site: halves r (high), s (low)
    column key (32 bits)   c, the high half of mix64 of the column's number in the whole matrix
    number (32 bits)       z = (r XOR c) * 0x7FEB352D;  number = (z XOR z >> 15) * (s OR 1)
    kept                   where the number, as int32, is at least p * 2^32 - 2^31

The second factor belongs to the row, so that two columns with unlucky keys are not alike in all rows.

Shapes: n = rows, m = columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import library
from torch.autograd.function import once_differentiable

from megachiar.kernels import gpu, triton_dropout
from megachiar.kernels.hash import GOLDEN, mix64, wrap64
from megachiar.kernels.tables import cached_table

CHUNK = 2**18
"""Elements that a CPU hashes at once: with their 32-bit numbers they stay in a core's cache."""
DEVICE_CHUNK = 2**24
"""Elements that another device hashes at once, where it has no Triton."""
FACTOR = 0x7FEB352D
"""The first factor of the hash."""


class KeyedDropout(NamedTuple):
    """Dropout of rows at one site of the model.

    Attributes:
        probability: probability of an element to become 0; the others are scaled by 1 / (1 - probability).
        keys: (n,) int64, the rows' keys from ``row_keys``.
        site: number of the sub-layer in the model where it acts.
    """

    probability: float
    keys: torch.Tensor
    site: int

    @property
    def scale(self) -> float:
        """The factor of the elements that stay."""
        return 1 / (1 - self.probability)

    def select(self, rows: torch.Tensor) -> KeyedDropout:
        """Return the dropout of the rows at these indices (int64)."""
        return self._replace(keys=self.keys.index_select(0, rows))


def least_kept(probability: float) -> int:
    """Return the smallest int32 number of an element that stays."""
    return int(probability * 2**32) - 2**31


def row_keys(seed: int, sample_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the key of each row: int64, in the shape that ``sample_ids`` and ``positions`` (int64) broadcast to."""
    return mix64(mix64(sample_ids + wrap64((seed + 1) * GOLDEN)) + positions * GOLDEN)


def head_keys(keys: torch.Tensor, first_head: int, heads: int) -> torch.Tensor:
    """Return a key for each of ``heads`` heads from ``first_head`` on: (...) becomes (..., heads)."""
    numbers = torch.arange(first_head + 1, first_head + heads + 1, device=keys.device)
    return mix64(keys[..., None] + numbers * GOLDEN)


def apply_dropout(x: torch.Tensor, dropout: KeyedDropout | None, first_column: int = 0) -> torch.Tensor:
    """Drop elements of ``x`` and scale the others.

    Args:
        x: (n, m).
        dropout: with keys (n,) of the rows; None for no dropout.
        first_column: number of the first column of ``x`` in the whole matrix, where ranks share its columns.

    Returns:
        (n, m); ``x`` itself without dropout or with probability 0.
    """
    if dropout is None or dropout.probability == 0:
        return x
    return _Dropout.apply(x, dropout.keys, dropout.probability, dropout.site, first_column)


class _Dropout(torch.autograd.Function):
    """The backward pass computes the mask again, instead of keeping it."""

    @staticmethod
    def forward(ctx, x, keys, *arguments):
        ctx.save_for_backward(keys)
        ctx.arguments = arguments
        return _dropped(x, keys, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _dropped(gradient, *ctx.saved_tensors, *ctx.arguments), None, None, None, None


@library.custom_op("megachiar::dropped", mutates_args=())
def _dropped(x: torch.Tensor, keys: torch.Tensor, probability: float, site: int, first_column: int) -> torch.Tensor:
    """Drop elements of rows. To ``torch.compile`` this is one operation, whose blocks are not unrolled."""
    drop = Dropper(KeyedDropout(probability, keys, site), x.shape[1], first_column)
    return drop(x, drop.keys, torch.empty_like(x, memory_format=torch.contiguous_format))


@_dropped.register_fake
def _(x: torch.Tensor, *_) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Dropper:
    """This drops elements of rows block by block, and scales the others. It computes once what all blocks need.

    Attributes:
        keys: the rows' keys in the shape of ``dropout.keys``; they are mixed with the site already, unless the kernel
            does that. The caller passes the part of them that belongs to a block's rows.
    """

    def __init__(self, dropout: KeyedDropout, columns: int, first_column: int = 0):
        device = dropout.keys.device
        self.site = dropout.site
        self.scale = dropout.scale
        self.least = least_kept(dropout.probability)
        self.columns = column_keys(first_column, columns, device)
        self.one_kernel = gpu.has_kernels(device)
        self.keys = dropout.keys if self.one_kernel else mix64(dropout.keys + wrap64(dropout.site * GOLDEN))
        self.chunk = CHUNK if device.type == "cpu" else DEVICE_CHUNK
        self.spare = torch.empty(2, 0, dtype=torch.int32, device=device)

    def __call__(self, x: torch.Tensor, keys: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write a block after dropout to ``out``, and return it.

        Args:
            x: (n, m), whose columns are the first m ones.
            keys: (n,), the part of ``self.keys`` that belongs to its rows.
            out: (n, m), contiguous; it may be ``x``.
        """
        columns = self.columns[: x.shape[1]]
        if self.one_kernel:
            return triton_dropout.drop(x, keys, columns, self.site, self.least, self.scale, FACTOR, out)
        first, second = (keys >> 32).int()[:, None], ((keys << 32 >> 32).int() | 1)[:, None]
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        step = max(1, self.chunk // max(1, x.shape[1]))
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            kept = self._kept(first[rows], second[rows], columns)
            torch.mul(x[rows], self.scale, out=out[rows]).view(bits).bitwise_and_(kept.to(bits))
        return out

    def _kept(self, first: torch.Tensor, second: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Return a mask (n, m) int32: all bits are set where an element stays, none where it is dropped.

        ``first`` and ``second`` (n, 1) are the halves of the rows' keys, ``columns`` (m,) the keys of the columns.
        """
        # All operations are in place and on 32-bit integers, which are vectorised: bool masks take several times as
        # long.
        count = len(first) * len(columns)
        if self.spare.shape[1] < count:
            self.spare = self.spare.new_empty(2, count)
        number, shifted = self.spare[:, :count].view(2, len(first), len(columns))
        torch.bitwise_xor(first, columns, out=number).mul_(FACTOR)
        torch.bitwise_right_shift(number, 15, out=shifted).bitwise_and_(0x1FFFF)
        return number.bitwise_xor_(shifted).mul_(second).ge_(self.least).neg_()


@cached_table
def column_keys(first: int, count: int, device: torch.device) -> torch.Tensor:
    """Return the keys (count,) int32 of columns ``first`` to ``first + count - 1``."""
    return (mix64((torch.arange(first, first + count, device=device) + 1) * GOLDEN) >> 32).int()
