"""How the rows of a micro-batch lie: sequence by sequence, position by position."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Grid(NamedTuple):
    """Row ``b * length + t`` is the token at position ``past + t`` of sequence ``b``.

    Attributes:
        sequences: B.
        length: tokens of each sequence in this pass.
        past: positions before them that a decoding cache holds.
    """

    sequences: int
    length: int
    past: int = 0

    @property
    def rows(self) -> int:
        return self.sequences * self.length

    def positions(self, device: torch.device) -> torch.Tensor:
        """Position (length,) of each token within its sequence."""
        return torch.arange(self.past, self.past + self.length, device=device)
