"""The MetaRouter: the gate of layer 1, which says how much of its DCT mixing is taken (paper, MetaRouter).

Shapes: B = sequences, T = tokens of a sequence, N = B * T rows, m = this rank's rows (N, or N / p with sequence
parallelism), d = channels, p = ranks of the group.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.errors import UserError
from megachiar.model.batch_layout import BatchLayout
from megachiar.model.kv_cache import DecodingCache
from megachiar.parallel.collectives import all_gather_rows
from megachiar.parallel.linear import ReplicatedLinear
from megachiar.topology import TensorParallelGroup


class MetaRouter(nn.Module):
    """The gate ``g = sigmoid(v . mean(x) + b)``.

    ``pool: batch`` is the published form. Its mean runs over all tokens of the micro-batch, so that every logit depends
    on later tokens and on the other sequences of the batch. Perplexities under it are not those of a language model
    that reads from left to right. ``pool: causal`` takes the mean over the prefix of the token's own sequence, or of
    its own document where attention keeps to documents.
    """

    def __init__(self, config: ModelConfig, group: TensorParallelGroup):
        super().__init__()
        self.pool = config.meta_router.pool
        self.group = group
        self.gate = ReplicatedLinear(config.hidden_size, 1, group)

    def forward(self, x: torch.Tensor, layout: BatchLayout, cache: DecodingCache | None) -> torch.Tensor:
        """Compute the gate (m, 1) of this rank's rows ``x`` (m, d), or (1, 1) for all of them with ``pool: batch``.

        Raises:
            UserError: incremental decoding with ``pool: batch``, whose mean would need the tokens to come.
        """
        wide = x if x.dtype == torch.float64 else x.float()
        mean = self._of_batch(wide, layout, cache) if self.pool == "batch" else self._of_prefix(wide, layout, cache)
        return torch.sigmoid(self.gate(mean.to(x.dtype)))

    def _of_batch(self, x: torch.Tensor, layout: BatchLayout, cache: DecodingCache | None) -> torch.Tensor:
        """Compute the mean (1, d) of all rows of the micro-batch but padding."""
        if cache is not None:
            raise UserError(
                "model.meta_router.pool",
                "is batch: its gate depends on tokens that are not generated yet",
                "give the whole text without a cache, or use a model trained with pool: causal or none",
            )
        if layout.row_weights is not None:
            mean = layout.mean_of_rows(x)[None]
            return all_gather_rows(mean, self.group).mean(0, keepdim=True) if self.group.shards_rows else mean
        total = x.sum(0, keepdim=True)
        if self.group.shards_rows:  # (p, d) of the ranks' sums: their gradients come back from all ranks
            total = all_gather_rows(total, self.group).sum(0, keepdim=True)
        return total / layout.num_rows

    def _of_prefix(self, x: torch.Tensor, layout: BatchLayout, cache: DecodingCache | None) -> torch.Tensor:
        """Compute the mean (m, d) of the tokens up to each row in its sequence or document."""
        if self.group.shards_rows:
            total = self._sharded_prefix_sum(x, layout)
        else:
            total = x.view(layout.sequences, layout.length, -1).cumsum(1)
            if cache is not None:
                before = cache.totals
                total = total if before is None else total + before[:, None]
                cache.set_totals(total[:, -1])
            total = total.flatten(0, 1)
        position = layout.local_positions(x.device)
        if layout.document_starts is None:
            return total / (position[:, None] + 1)
        local = layout.local_slice
        start = layout.document_starts.flatten()[local]
        whole = all_gather_rows(total, self.group) if self.group.shards_rows else total
        last_before = torch.arange(local.start, local.stop, device=x.device) - position + start - 1
        before = whole.index_select(0, last_before.clamp_min(0)).masked_fill((start == 0)[:, None], 0)
        return (total - before) / (position - start + 1)[:, None]

    def _sharded_prefix_sum(self, x: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Compute sums (m, d) over the prefix of each row's sequence, where earlier ranks may have its beginning.

        rank 0    a a a b b b | rank 1    b b b b c c      tail of rank 0: its rows of b, which come before rank 1's
        """
        first, block = layout.local_slice.start, layout.num_rows // self.group.size
        # Rows of one sequence are one run, and each run is summed by itself.
        edges = list(range(-(-first // layout.length) * layout.length, first + block, layout.length))
        starts = sorted({first, *edges}) + [first + block]
        sums = [x[a - first : b - first].cumsum(0) for a, b in pairwise(starts)]
        # (p, d): sum of each rank's rows of the last sequence that it has.
        tails = all_gather_rows(sums[-1][-1:], self.group)
        last_sequence = [(rank * block + block - 1) // layout.length for rank in range(self.group.size)]
        before = [rank for rank in range(self.group.rank) if last_sequence[rank] == first // layout.length]
        # Every rank uses all tails, if only with weight 0: all ranks take part in the gradient's reduction.
        weights = torch.zeros(self.group.size, dtype=x.dtype, device=x.device)
        weights[before] = 1
        return torch.cat([sums[0] + weights @ tails, *sums[1:]])
