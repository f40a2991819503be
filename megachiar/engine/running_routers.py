"""What routers carry from step to step: running thresholds, and the scale of the values that learned routers measure.

    step k    forward: share of attention, explored tokens     backward: values of explored tokens
              one reduction over all ranks (step_metrics), one answer for all: taken or left out
              taken: threshold += RATE * unit * (share - target) / (4 target (1 - target))
                     mean square of values <- running mean

All ranks compute the update from the reduced numbers, so that a run has the same thresholds in every layout. They are
buffers of the model: checkpoints hold them, and a step that is left out does not move them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.model.router import Router

THRESHOLD_RATE = 0.5
"""How fast thresholds move, in ``Router.threshold_unit``.

For scores that are normal with a deviation of one unit, the distance to the wanted threshold shrinks by about a fifth
in each step, whatever the wanted share.
"""

LEAST_SPREAD = 0.2
"""Least of 4 p (1 - p) for a wanted share p: near 0 and 1 a threshold would jump."""

MEAN_SQUARE_RATE = 0.02
"""Weight of a step's values in the running mean of their squares: it remembers some 50 steps."""


class ValueSums(NamedTuple):
    """Sums over the explored tokens of a layer in a step.

    Attributes:
        squares: of the measured values, in units of the loss, squared.
        errors: of the squared errors of the predictions, in the same units.
        tokens: number of explored tokens.
    """

    squares: float = 0.0
    errors: float = 0.0
    tokens: float = 0.0

    @property
    def explained(self) -> float:
        """Return which part of the values' mean square the head predicts; nan where nothing was measured."""
        return 1 - self.errors / self.squares if self.squares > 0 and self.errors > 0 else float("nan")


def value_layers(config: ModelConfig) -> list[int]:
    """Return the layers, from 0, in which values are measured."""
    return list(config.routed_layers) if config.router.kind == "learned" else []


class RunningRouters:
    """The routers of this rank that carry something from step to step.

    Args:
        model: or the part of it that this rank holds.
        config: of the whole model.
    """

    def __init__(self, model: nn.Module, config: ModelConfig):
        routers = (module for module in model.modules() if isinstance(module, Router))
        self._routers = [router for router in routers if router.running_threshold is not None]
        self._config = config

    def begin_step(self, gradient_scale: float) -> None:
        """Forget what a step that was broken off has measured.

        Args:
            gradient_scale: factor that the gradients of a micro-batch's mean loss are scaled by in this step.
        """
        for router in self._routers:
            if router.value_head is not None:
                router.value_head.gradient_scale = gradient_scale
                router.value_head.sums = None

    def measure(self, device: torch.device) -> torch.Tensor:
        """Return the sums of this step on ``device``, float64: three for each layer of ``value_layers``.

        They are 0 for layers of other ranks, and where nothing was measured.
        """
        nothing = torch.zeros(len(ValueSums._fields), dtype=torch.float64, device=device)
        measured = {router.layer: router.value_head.sums for router in self._routers if router.value_head}
        sums = (measured.get(layer) for layer in value_layers(self._config))
        return torch.cat([nothing[:0], *(nothing if each is None else each for each in sums)])

    @torch.no_grad()
    def follow(self, attention_share: list[float], values: Iterable[ValueSums]) -> None:
        """Move thresholds and mean squares after a step that was taken.

        Args:
            attention_share: of every layer in this step, over all ranks.
            values: over all ranks, for each layer of ``value_layers``.
        """
        of_config, by_layer = self._config.router, dict(zip(value_layers(self._config), values, strict=True))
        target = of_config.target_share if of_config.kind != "random" else of_config.attention_share
        for router in self._routers:
            assert target is not None and router.running_threshold is not None
            wanted = self._wanted(router, target)
            if of_config.kind == "random":  # its score is uniform in [0, 1), whatever the tokens are
                router.running_threshold.value.copy_(1 - wanted)
                continue
            surplus = (attention_share[router.layer] - wanted) / (4 * wanted * (1 - wanted)).clamp_min(LEAST_SPREAD)
            router.running_threshold.value.add_(THRESHOLD_RATE * router.threshold_unit * surplus)
            sums = by_layer.get(router.layer, ValueSums())
            if router.value_head is not None and sums.tokens > 0:
                router.value_head.follow(sums.squares / sums.tokens, MEAN_SQUARE_RATE)

    def _wanted(self, router: Router, target: float) -> torch.Tensor:
        """Return the share (1,) that the next step is to have, which falls to ``target`` while a router is annealed."""
        if router.annealed_steps is None:
            return torch.full((1,), target, device=router.running_threshold.value.device)  # type: ignore[union-attr]
        steps = router.annealed_steps.value.add_(1)
        return 1 - (1 - target) * (steps / self._config.router.anneal_steps).clamp_max(1)
