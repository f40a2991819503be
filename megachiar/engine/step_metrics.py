"""The numbers that a training step reports, and the one vector in which they are summed over the ranks.

    index      0      1             2 ... 4L + 1                      4L + 2          4L + 3    4L + 4
    value      loss   regulariser   statistics, L values for each     gradient norm   skipped   stop
               `-- means over the micro-batches of this rank --'

L is the number of layers, and the statistics come in the order of ``RoutingStatistics``. Every rank makes such a
vector. The engine averages them over replicas and tensor-parallel ranks, and adds up the pipeline stages. A value that
several stages know is therefore given by one of them, and the others give 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
        gradient_norm: global L2 norm of the gradients before clipping.
        skipped: whether gradients overflowed in fp16, so that no parameter changed.
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


@dataclass(frozen=True)
class RankMetrics:
    """What one rank measured in a step.

    Attributes:
        forward: the first 2 + 4L values of the vector; 0 for what other pipeline stages know.
        gradient_norm: global L2 norm of the gradients before clipping, over all ranks.
    """

    forward: list[float]
    gradient_norm: float


def flatten_forward(loss: torch.Tensor, regulariser: torch.Tensor, statistics: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the values of a forward pass as one float64 vector (2 + 4L,) on the model's device.

    One vector is read from the device once. ``loss`` and ``regulariser`` are scalars; ``statistics`` are four tensors
    (L,).
    """
    return torch.cat([part.detach().double().reshape(-1) for part in (loss, regulariser, *statistics)])


def flatten_step(metrics: RankMetrics, *, skipped: bool, stop: bool, is_last_stage: bool) -> list[float]:
    """Return the vector of one rank. All stages know the gradient norm, and the last one gives it."""
    norm = metrics.gradient_norm if is_last_stage else 0.0
    return [*metrics.forward, norm, float(skipped), float(stop)]


def unflatten_step(values: list[float], layers: int) -> StepResult:
    """Return the result of a step from the averaged vector of a model of ``layers`` layers."""
    loss, regulariser, *rest = values
    statistics = {name: rest[i * layers : (i + 1) * layers] for i, name in enumerate(STATISTICS)}
    gradient_norm, skipped, stop = rest[len(STATISTICS) * layers :]
    return StepResult(
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
