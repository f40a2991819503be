"""Cross-entropy over a vocabulary that the ranks of a group share: no rank ever holds all logits of a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megachiar.parallel.collectives import all_gather
from megachiar.topology import TensorParallelGroup


@dataclass(frozen=True)
class VocabularyShard:
    """The token ids whose rows of the embedding this rank holds: ``first`` to ``first + size - 1``.

    Attributes:
        group: the ranks that share the vocabulary.
        size: ids of each rank.
    """

    group: TensorParallelGroup
    size: int

    @property
    def first(self) -> int:
        """The first id of this rank."""
        return self.group.rank * self.size

    def merge(self, scale: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge the ranks' values for their shards into those for the whole vocabulary.

        Args:
            scale: (n,) log-sum-exp of this rank's logits.
            target: (n,) logit of the target, 0 where another rank has it.

        Returns:
            (n,) log-sum-exp of all logits and (n,) logit of the target, the same on all ranks.
        """
        everyone = all_gather(torch.stack([scale, target])[None], self.group)  # (p, 2, n)
        return everyone[:, 0].logsumexp(0), everyone[:, 1].sum(0)
