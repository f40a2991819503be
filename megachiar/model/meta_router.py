"""The gate of layer 1: how much of its DCT mixing is taken (paper, MetaRouter)."""

from __future__ import annotations

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.errors import UserError
from megachiar.model.cache import LayerCache
from megachiar.model.grid import Grid


class MetaRouter(nn.Module):
    """``g = sigmoid(v . mean(x) + b)``.

    ``pool: batch`` is the published form. Its mean runs over all tokens of the micro-batch, so that every logit depends
    on later tokens and on what else is in the batch; perplexities under it are not those of a language model that
    reads from left to right. ``pool: causal`` takes the mean over the prefix of the token's own sequence.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.pool = config.meta_router.pool
        self.gate = nn.Linear(config.hidden_size, 1)

    def forward(self, x: torch.Tensor, grid: Grid, cache: LayerCache | None) -> torch.Tensor:
        """Gate (N, 1) of rows x (N, d), or (1, 1) for all of them with ``pool: batch``.

        Raises:
            UserError: incremental decoding with ``pool: batch``, whose mean would need the tokens to come.
        """
        wide = x if x.dtype == torch.float64 else x.float()
        if self.pool == "batch":
            if cache is not None:
                raise UserError(
                    "model.meta_router.pool",
                    "is batch: its gate depends on tokens that are not generated yet",
                    "sample from a model trained with pool: causal or none",
                )
            return torch.sigmoid(self.gate(wide.mean(0, keepdim=True).to(x.dtype)))
        total = wide.view(grid.sequences, grid.length, -1).cumsum(1)
        if cache is not None:
            total = total if cache.total is None else total + cache.total[:, None]
            cache.total = total[:, -1]
        mean = total / (grid.positions(x.device)[:, None] + 1)
        return torch.sigmoid(self.gate(mean.flatten(0, 1).to(x.dtype)))
