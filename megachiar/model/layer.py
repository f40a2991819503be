"""A layer: an operator sub-layer, chosen per token, and the feed-forward sub-layer that all operators share.

A routed layer sorts its rows by operator, lets each operator compute its own rows alone, runs the feed-forward on the
sorted rows and puts them back:

    x (N, d) --router--> [attention rows | rbf rows | dct rows] --operators--> --feed-forward--> unsorted (N, d)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.permute import permute_rows
from megachiar.model.attention import SelfAttention
from megachiar.model.cache import DecodingCache
from megachiar.model.feed_forward import FeedForward
from megachiar.model.grid import Grid
from megachiar.model.rbf import RbfMixing
from megachiar.model.router import Decision, Router, collapse_regulariser
from megachiar.model.spectral import DctMixing


class LayerOutput(NamedTuple):
    """What a layer gives besides its rows; all but ``regulariser`` without gradient.

    Attributes:
        rows: (N, d).
        regulariser: scalar to add to the loss; None if there is none.
        attention_share, rbf_share: scalars, share of rows that took the operator (mean gate of a soft router).
        entropy: scalar, mean H; nan where the layer does not route.
    """

    rows: torch.Tensor
    regulariser: torch.Tensor | None
    attention_share: torch.Tensor
    rbf_share: torch.Tensor
    entropy: torch.Tensor


class FixedLayer(nn.Module):
    """A layer whose rows all take one operator: DCT mixing (layer 1) or attention (layer L, the baseline)."""

    def __init__(self, config: ModelConfig, operator: str, name: str):
        super().__init__()
        self.name, self.is_attention = name, operator == "attention"
        self.operator = SelfAttention(config) if self.is_attention else DctMixing(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: torch.Tensor, grid: Grid, cache: DecodingCache | None) -> LayerOutput:
        if self.is_attention:
            y = self.operator(x, x, None, grid, cache and cache.layer(f"{self.name}.attention"))
        else:
            y = self.operator(x)
        zero = torch.zeros((), dtype=torch.float32, device=x.device)
        share, nan = torch.full_like(zero, float(self.is_attention)), torch.full_like(zero, torch.nan)
        return LayerOutput(self.feed_forward(y), None, share, zero, nan)


class RoutedLayer(nn.Module):
    """A layer whose router chooses an operator for each row."""

    def __init__(self, config: ModelConfig, index: int, name: str):
        super().__init__()
        self.name, self.names = name, config.router.operators
        self.collapse_weight = config.router.collapse_weight
        self.router = Router(config, index)
        self.attention = SelfAttention(config)
        self.dct = DctMixing(config)
        if "rbf" in self.names:
            self.rbf = RbfMixing(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: torch.Tensor, grid: Grid, cache: DecodingCache | None) -> LayerOutput:
        decision = self.router(x, grid)
        if self.router.kind == "soft":
            rows = self.feed_forward(self._blend(x, decision, grid, cache))
            use = decision.gates.detach().mean(0)
        else:
            rows, use = self._route(x, decision, grid, cache)
        share = dict(zip(self.names, use.float(), strict=True))
        regulariser = None
        if decision.utilisation is not None:
            regulariser = collapse_regulariser(decision.utilisation, self.collapse_weight)
        nothing = torch.zeros((), dtype=torch.float32, device=x.device)
        return LayerOutput(
            rows, regulariser, share["attention"], share.get("rbf", nothing), decision.entropy.float().mean()
        )

    def _route(
        self, x: torch.Tensor, decision: Decision, grid: Grid, cache: DecodingCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (N, d) after both sub-layers, each row through its own operator, and the operators' shares (O,)."""
        # Last operator first: attention rows lead. A stable sort keeps rows of one operator in ascending order.
        order = torch.argsort(decision.operator, descending=True, stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        counts = torch.bincount(decision.operator, minlength=len(self.names))
        sizes = counts.tolist()[::-1]
        ordered = permute_rows(x, order, inverse)
        results = [
            self._operate(name, x, chosen, rows, decision.spectrum, grid, cache)
            for name, chosen, rows in zip(reversed(self.names), ordered.split(sizes), order.split(sizes), strict=True)
        ]
        y = torch.cat(results)
        if decision.gates is not None:  # hard: value 1, gradient that of the chosen operator's gate
            gate = decision.gates.gather(-1, decision.operator[:, None])[order].to(y.dtype)
            y = y * (1 + gate - gate.detach())
        return permute_rows(self.feed_forward(y), inverse, order), counts / len(order)

    def _blend(self, x: torch.Tensor, decision: Decision, grid: Grid, cache: DecodingCache | None) -> torch.Tensor:
        """soft: every operator for every row, weighted by the gates."""
        rows = torch.arange(len(x), device=x.device)
        results = [self._operate(name, x, x, rows, decision.spectrum, grid, cache) for name in self.names]
        gates = decision.gates.to(x.dtype)
        return sum(gate[:, None] * result for gate, result in zip(gates.unbind(-1), results, strict=True))

    def _operate(
        self,
        name: str,
        x: torch.Tensor,
        chosen: torch.Tensor,
        rows: torch.Tensor,
        spectrum: torch.Tensor,
        grid: Grid,
        cache: DecodingCache | None,
    ) -> torch.Tensor:
        """Operator ``name`` on its rows. It runs even with none: ranks must gather and reduce alike."""
        if name == "dct":
            return self.dct(chosen, spectrum.index_select(0, rows))
        operator = self.attention if name == "attention" else self.rbf
        return operator(x, chosen, rows, grid, cache and cache.layer(f"{self.name}.{name}"))
