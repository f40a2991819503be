"""Ask whether a router would decide alike if the channels of its rows stood in another order.

The order of channels means nothing to the model around a new router: attention and feed-forward can learn any of them.
A router that decides alike under another order (agreement 1) reads the row as a set of numbers, or does not read it.
One that agrees no more than chance reads what this order alone holds: structure along the channels, or a hash of the
row.

Shapes: R = routed layers, S = sequences, T = tokens, P = permutations, N = rows of a batch, d = channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from megachiar.analysis.resampling import UNKNOWN, Estimate
from megachiar.analysis.routed_tokens import batches
from megachiar.analysis.windows import Windows
from megachiar.model import ChiarFormer
from megachiar.model.batch_layout import BatchLayout
from megachiar.model.layer import RoutedLayer

T_QUANTILES = {4: 3.18, 8: 2.36, 16: 2.13, 32: 2.04}
"""Of Student's distribution at 97.5 % by the number of permutations, for intervals of their mean."""


@dataclass(frozen=True)
class Agreement:
    """How often two routers give a token the same operator.

    Attributes:
        agreement: share of the tokens.
        chance: that share for independent routers with these shares: f^2 + (1 - f)^2 at equal share f.
        spread: standard deviation of ``agreement`` over the permutations; how far one permutation goes from chance.
        beyond_chance: (agreement - chance) / (1 - chance), Cohen's kappa: 0 by chance, 1 where all routes agree. Its
            interval of 95 % is over permutations.
    """

    agreement: float
    chance: float
    spread: float
    beyond_chance: Estimate


class ChannelPermutations:
    """The routes that a model's routers decide for rows whose channels are permuted.

    Args:
        model: in evaluation mode.
        permutations: number of random orders, P.
        seed: of the orders.
    """

    def __init__(self, model: ChiarFormer, permutations: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        d = model.config.hidden_size
        self.model = model
        self.orders = [torch.randperm(d, generator=generator) for _ in range(permutations)]

    def __call__(self, windows: Windows, batch_size: int, advance: Callable[[int], None]) -> np.ndarray:
        """Return the routes (R, P, S, T) int8; arguments are as in ``collect_routes``."""
        parts = []
        for batch in batches(self.model, windows, batch_size):
            parts.append(self._of_batch(batch))
            advance(len(batch[0]))
        return np.concatenate(parts, 2)

    def _of_batch(self, batch: tuple[torch.Tensor, ...]) -> np.ndarray:
        found: list[torch.Tensor] = []
        layers = [layer for layer in self.model.layers if isinstance(layer, RoutedLayer)]
        hooks = [layer.register_forward_pre_hook(partial(self._decide, found)) for layer in layers]
        try:
            with torch.inference_mode():
                self.model(*batch)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found).view(len(layers), len(self.orders), *batch[0].shape).cpu().numpy()

    def _decide(self, found: list[torch.Tensor], layer: RoutedLayer, arguments: tuple[Any, ...]) -> None:
        """Add the routes (P, N) of a layer for its rows in each order of the channels."""
        rows: torch.Tensor = arguments[0]
        layout: BatchLayout = arguments[1]
        decided = [
            layer.router(rows[:, order.to(rows.device)], layout).operator.to(torch.int8) for order in self.orders
        ]
        found.append(torch.stack(decided))


def agreement_over_permutations(routes: np.ndarray, permuted: np.ndarray) -> Agreement:
    """Compare the routes (N,) of a layer with those of permuted channels (P, N), integers from 0."""
    operators = 1 + max(int(routes.max()), int(permuted.max()))
    shares = np.bincount(routes, minlength=operators) / routes.size
    of_permuted = np.stack([np.bincount(row, minlength=operators) / row.size for row in permuted])
    agreements, chances = (permuted == routes).mean(1), of_permuted @ shares
    count = len(permuted)
    beyond = UNKNOWN
    if count > 1 and float(chances.max()) < 1 - 1e-9:
        kappas = (agreements - chances) / (1 - chances)
        quantile = next(T_QUANTILES[n] for n in sorted(T_QUANTILES, reverse=True) if n <= max(count, 4))
        margin = quantile * float(kappas.std(ddof=1)) / count**0.5
        value = float(kappas.mean())
        beyond = Estimate(value=value, low=value - margin, high=value + margin)
    return Agreement(
        agreement=float(agreements.mean()),
        chance=float(chances.mean()),
        spread=float(agreements.std(ddof=1)) if count > 1 else float("nan"),
        beyond_chance=beyond,
    )
