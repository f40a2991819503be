"""The numbers that a training step reports, and the one vector in which they are summed over the ranks.

    index   0      1             2 ... 5L + 1           3A values         3V values        and three more
    value   loss   regulariser   statistics, L values   auxiliary tasks   explored tokens  gradient norm, skipped, stop
            `-- means over the main micro-batches --'   `------- sums --------'

L is the number of layers. The statistics come in the order of ``RoutingStatistics``. The last of them, the share of
rows that are no padding, weights the others, which are therefore means over all real rows of the step. Of each of the A
auxiliary tasks of a mixed run there are three sums over the micro-batches of the step: of losses, of gates, and their
number. Of each of the V layers with a learned router there are the ``ValueSums`` of the tokens that were explored.
Every rank makes such a vector. The engine averages them over replicas and tensor-parallel ranks, and adds up the
pipeline stages. A value that several stages know is therefore given by one of them, and the others give 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from megachiar.engine.running_routers import ValueSums
from megachiar.model import RoutingStatistics

STATISTICS = RoutingStatistics._fields
"""Names of the statistics that each layer reports."""


@dataclass(frozen=True)
class TaskResult:
    """What an auxiliary task gave in a step, averaged over its micro-batches.

    Attributes:
        loss: mean cross-entropy in nats, per token or per labelled sequence.
        gate: mean g of the MetaRouter; nan without one.
        batches: how many micro-batches of the task each replica had.
    """

    loss: float
    gate: float
    batches: float


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, averaged over micro-batches and data-parallel ranks. Floats are float64.

    All but ``tasks`` and the gradients are those of the main task.

    Attributes:
        loss: mean cross-entropy in nats, per token or per labelled sequence.
        regulariser: mean of what was added to the loss.
        gradient_norm: global L2 norm of the gradients before clipping; inf where a gradient is not finite.
        skipped: whether the step was left out on all ranks: no weight, moment or count of steps changed.
        stop: whether any rank was asked to stop.
        attention_share, rbf_share, entropy: one value per layer; entropy is nan where a layer does not route.
        gate: mean g of the MetaRouter; nan without one.
        tasks: the auxiliary tasks that the step had a batch of, by name.
        values: what was measured in each layer with a learned router, in the order of the layers.
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
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    values: list[ValueSums] = field(default_factory=list)

    @property
    def is_finite(self) -> bool:
        """Return whether losses, regulariser and gradients were finite on every rank."""
        losses = [self.loss, *(task.loss for task in self.tasks.values())]
        return all(math.isfinite(value) for value in (*losses, self.regulariser, self.gradient_norm))


def flatten_forward(loss: torch.Tensor, regulariser: torch.Tensor, statistics: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the values of a forward pass as one float64 vector (2 + 5L,) on the model's device.

    ``loss`` and ``regulariser`` are scalars; ``statistics`` are five tensors (L,) as ``RoutingStatistics.summable`` has
    them.
    """
    return torch.cat([part.detach().double().reshape(-1) for part in (loss, regulariser, *statistics)])


def flatten_auxiliary(
    losses: Sequence[Sequence[torch.Tensor]], gates: Sequence[Sequence[torch.Tensor]], device: torch.device
) -> torch.Tensor:
    """Return the values of the auxiliary tasks (3A,) float64, from scalars for each micro-batch of each task.

    Args:
        losses: of each task; none on the pipeline stages that do not know them.
        gates: of each task; none on the stages without layer 1.
        device: of this rank.
    """
    values = [torch.zeros(0, dtype=torch.float64, device=device)]
    for of_losses, of_gates in zip(losses, gates, strict=True):
        for scalars in (of_losses, of_gates):
            of_task = torch.stack(list(scalars)).double() if scalars else values[0]
            values.append(of_task.sum()[None])
        values.append(torch.full((1,), len(of_losses), dtype=torch.float64, device=device))
    return torch.cat(values)


def flatten_rank(
    forward: torch.Tensor, auxiliary: torch.Tensor, values: torch.Tensor, gradient_norm: torch.Tensor | float
) -> torch.Tensor:
    """Return what one rank measured in a step as one float64 vector, which is read from the device once.

    Args:
        forward: the first 2 + 5L values of the vector; 0 for what other pipeline stages know.
        auxiliary: the 3A values of the auxiliary tasks.
        values: the 3V sums of explored tokens.
        gradient_norm: global L2 norm of the gradients before clipping, over all ranks; below 0, inf or nan where a
            gradient is not finite. It is the last value.
    """
    if isinstance(gradient_norm, torch.Tensor):
        norm = gradient_norm.to(forward).reshape(1)
    else:
        norm = torch.full_like(forward[:1], gradient_norm)
    return torch.cat([forward, auxiliary, values, norm])


def flatten_step(measured: list[float], *, skipped: bool, stop: bool, is_last_stage: bool) -> list[float]:
    """Return the vector of one rank, from what it measured as ``flatten_rank`` orders it.

    All stages know the gradient norm, and the last one gives it. A rank whose gradients are not finite makes the norm
    inf, whatever stage it is on.
    """
    *sums, norm = measured
    if not math.isfinite(norm) or norm < 0:
        norm = math.inf
    elif not is_last_stage:
        norm = 0.0
    return [*sums, norm, float(skipped), float(stop)]


def unflatten_step(
    values: list[float], layers: int, auxiliary: Sequence[str] = (), value_layers: int = 0
) -> StepResult:
    """Return the result of a step from the averaged vector of a model of ``layers`` layers.

    ``auxiliary`` are the names of the auxiliary tasks, and ``value_layers`` is V.

    A step whose loss, regulariser or gradients are not finite on any rank is a skipped one.
    """
    loss, regulariser, *rest = values
    *weighted, real_shares = (rest[i * layers : (i + 1) * layers] for i in range(len(STATISTICS)))
    means = ([value / share for value, share in zip(values, real_shares, strict=True)] for values in weighted)
    statistics = dict(zip(STATISTICS, means, strict=False))
    *sums, gradient_norm, skipped, stop = rest[len(STATISTICS) * layers :]
    of_tasks, of_values = sums[: 3 * len(auxiliary)], sums[3 * len(auxiliary) :]
    tasks = {
        name: TaskResult(loss=of_tasks[3 * i] / count, gate=of_tasks[3 * i + 1] / count, batches=count)
        for i, name in enumerate(auxiliary)
        if (count := of_tasks[3 * i + 2])
    }
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
        tasks=tasks,
        values=[ValueSums(*of_values[3 * i : 3 * i + 3]) for i in range(value_layers)],
    )
    return result if result.is_finite else replace(result, skipped=True)
