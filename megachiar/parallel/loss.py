"""Cross-entropy over a vocabulary that is shared out over ranks: no rank ever holds all logits of a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megachiar.parallel.collectives import all_gather
from megachiar.topology import TensorParallelGroup


@dataclass(frozen=True)
class VocabularyShard:
    """The ids that this rank has rows of the embedding for: ``first`` to ``first + size - 1``."""

    group: TensorParallelGroup
    size: int

    @property
    def first(self) -> int:
        return self.group.rank * self.size

    def merge(self, scale: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From each rank's shard to the whole vocabulary.

        Args:
            scale: (n,) log-sum-exp of this rank's logits.
            target: (n,) logit of the target, 0 where another rank has it.

        Returns:
            Both over all ranks.
        """
        everyone = all_gather(torch.stack([scale, target])[None], self.group)  # (p, 2, n)
        return everyone[:, 0].logsumexp(0), everyone[:, 1].sum(0)
