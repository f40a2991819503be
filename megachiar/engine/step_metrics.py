"""The numbers that a training step reports, and the one vector in which they are summed over the ranks.

    index      0      1             2 ... 4L + 1                      4L + 2          4L + 3    4L + 4
    value      loss   regulariser   statistics, L values for each     gradient norm   skipped   stop
               `-- means over the micro-batches of this rank --'

L is the number of layers, and the statistics come in the order of ``RoutingStatistics``. Every rank makes such a
vector. The engine averages them over replicas and tensor-parallel ranks, and adds up the pipeline stages. A value that
several stages know is therefore given by one of them, and the others give 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from megachiar.model import RoutingStatistics

STATISTICS = RoutingStatistics._fields
"""Names of the statistics that each layer reports."""


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, averaged over micro-batches and data-parallel ranks. Floats are float64.

    Attributes:
        loss: mean cross-entropy per token, in nats.
        regulariser: mean of what was added to the loss.
        gradient_norm: global L2 norm of the gradients before clipping; inf where a gradient is not finite.
        skipped: whether the step was left out on all ranks: no weight, moment or count of steps changed.
        stop: whether any rank was asked to stop.
        attention_share, rbf_share, entropy: one value per layer; entropy is nan where a layer does not route.
        gate: mean g of the MetaRouter; nan without one.
    """

    loss: float
    regulariser: float
    gradient_norm: float
    skipped: bool
    stop: bool
    attention_share: list[float]
    rbf_share: list[float]
    entropy: list[float]
    gate: float

    @property
    def is_finite(self) -> bool:
        """Return whether loss, regulariser and gradients were finite on every rank."""
        return all(math.isfinite(value) for value in (self.loss, self.regulariser, self.gradient_norm))


@dataclass(frozen=True)
class RankMetrics:
    """What one rank measured in a step.

    Attributes:
        forward: the first 2 + 4L values of the vector; 0 for what other pipeline stages know.
        gradient_norm: global L2 norm of the gradients before clipping, over all ranks; below 0, inf or nan where a
            gradient is not finite.
    """

    forward: list[float]
    gradient_norm: float

    @property
    def has_finite_gradients(self) -> bool:
        """Return whether every gradient was finite."""
        return math.isfinite(self.gradient_norm) and self.gradient_norm >= 0


def flatten_forward(loss: torch.Tensor, regulariser: torch.Tensor, statistics: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the values of a forward pass as one float64 vector (2 + 4L,) on the model's device.

    One vector is read from the device once. ``loss`` and ``regulariser`` are scalars; ``statistics`` are four tensors
    (L,).
    """
    return torch.cat([part.detach().double().reshape(-1) for part in (loss, regulariser, *statistics)])


def flatten_step(metrics: RankMetrics, *, skipped: bool, stop: bool, is_last_stage: bool) -> list[float]:
    """Return the vector of one rank. All stages know the gradient norm, and the last one gives it.

    A rank whose gradients are not finite makes the norm inf, whatever stage it is on.
    """
    norm = metrics.gradient_norm if is_last_stage else 0.0
    if not metrics.has_finite_gradients:
        norm = math.inf
    return [*metrics.forward, norm, float(skipped), float(stop)]


def unflatten_step(values: list[float], layers: int) -> StepResult:
    """Return the result of a step from the averaged vector of a model of ``layers`` layers.

    A step whose loss, regulariser or gradients are not finite on any rank is a skipped one.
    """
    loss, regulariser, *rest = values
    statistics = {name: rest[i * layers : (i + 1) * layers] for i, name in enumerate(STATISTICS)}
    gradient_norm, skipped, stop = rest[len(STATISTICS) * layers :]
    result = StepResult(
        loss=loss,
        regulariser=regulariser,
        gradient_norm=gradient_norm,
        skipped=skipped > 0,
        stop=stop > 0,
        attention_share=statistics["attention_share"],
        rbf_share=statistics["rbf_share"],
        entropy=statistics["entropy"],
        gate=statistics["gate"][0],
    )
    return result if result.is_finite else replace(result, skipped=True)
