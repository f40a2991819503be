"""Rows that the router sends to attention: which they are, and how they are packed side by side.

Shapes: B = sequences, S = rows (queries) of a sequence, n = routed rows, h = heads, c = channels of a head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch


class RoutedRows(NamedTuple):
    """Which of the B * S rows, sequence by sequence, are routed.

    Attributes:
        indices: (n,) int64, ascending.
        sequences: B.
        length: S. The queries of a sequence stand at the newest S of its positions.
    """

    indices: torch.Tensor
    sequences: int
    length: int

    @property
    def are_all(self) -> bool:
        """Whether every row is routed."""
        return len(self.indices) == self.sequences * self.length

    @property
    def sequence(self) -> torch.Tensor:
        """The sequence (n,) of each routed row."""
        return self.indices // self.length

    @property
    def position(self) -> torch.Tensor:
        """The position (n,) of each routed row among the S rows of its sequence."""
        return self.indices % self.length

    def counts(self) -> list[int]:
        """Return B numbers on the host: how many rows of each sequence are routed."""
        if self.are_all:
            return [self.length] * self.sequences
        if self.sequences == 1:
            return [len(self.indices)]
        starts = self.starts()
        return [end - start for start, end in pairwise(starts)]

    def of_sequence(self, number: int, counts: list[int]) -> RoutedRows:
        """Return the routed rows of one sequence, as those of a pass that has no other; ``counts`` are its own."""
        start = sum(counts[:number])
        indices = self.indices[start : start + counts[number]]
        return RoutedRows(indices - number * self.length, 1, self.length)

    def starts(self) -> list[int]:
        """Return B + 1 numbers on the host: how many routed rows come before each sequence, and n."""
        return torch.searchsorted(self.indices, torch.arange(self.sequences + 1) * self.length).tolist()


class Packing:
    """The routed rows of each sequence side by side, as (B, widest): behind the rows of a sequence comes padding.

    Args:
        rows: the routed rows, at least one. The host waits for the greatest number of them in a sequence.

    Attributes:
        starts: (B,) how many routed rows come before each sequence.
    """

    def __init__(self, rows: RoutedRows):
        sequence = rows.sequence
        counts = torch.bincount(sequence, minlength=rows.sequences)
        self.sequences = rows.sequences
        self.widest = int(counts.max())
        self.full = len(rows.indices) == self.sequences * self.widest
        self.starts = counts.cumsum(0) - counts
        number = torch.arange(len(rows.indices), device=rows.indices.device) - self.starts[sequence]
        self.slot = sequence * self.widest + number

    def pack(self, x: torch.Tensor, padding: float = 0) -> torch.Tensor:
        """Pack (n, ...) into (B, widest, ...)."""
        if not self.full:
            x = x.new_full((self.sequences * self.widest, *x.shape[1:]), padding).index_copy(0, self.slot, x)
        return x.unflatten(0, (self.sequences, self.widest))

    def pack_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Pack (n, h, c) into (B, h, widest, c)."""
        return self.pack(x).transpose(1, 2)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Invert ``pack``: take (n, ...) out of (B, widest, ...)."""
        flat = packed.flatten(0, 1)
        return flat if self.full else flat.index_select(0, self.slot)

    def unpack_heads(self, packed: torch.Tensor) -> torch.Tensor:
        """Invert ``pack_heads``: take (n, h, c) out of (B, h, widest, c)."""
        return self.unpack(packed.transpose(1, 2))
