"""Assign layers to pipeline stages, so that the largest number of FLOPs of any stage is as small as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megachiar.config.model import ModelConfig
from megachiar.planning.flops import forward_flops_per_token, layer_flops_per_token


@dataclass(frozen=True)
class Stage:
    """One stage of a pipeline.

    Attributes:
        number: number of this stage, from 0.
        count: number of stages; 1 without pipeline parallelism.
        layers: numbers of the layers on this stage, from 0.
    """

    number: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        """Return whether the embedding is on this stage."""
        return self.number == 0

    @property
    def is_last(self) -> bool:
        """Return whether the last norm, the head and the loss are on this stage."""
        return self.number == self.count - 1


def layer_groups(config: ModelConfig, interval: int | None) -> list[range]:
    """Return groups of ``interval`` layers; a pipeline does not separate those that are recomputed together."""
    step = interval or 1
    return [range(start, min(start + step, config.num_layers)) for start in range(0, config.num_layers, step)]


def stage_bounds(
    config: ModelConfig, interval: int | None, length: int, attention_share: float, stages: int
) -> list[int]:
    """Return the index in ``pipeline_parts`` of the first part of each stage, followed by the number of parts.

    Args:
        config: config of the model.
        interval: number of layers whose activations are recomputed together; None to keep all activations.
        length: tokens of a sequence.
        attention_share: expected share of a routed layer's tokens that take attention.
        stages: number of stages, at most that of ``layer_groups``.
    """
    bounds = _group_bounds(config, interval, length, attention_share, stages)
    # Parts: the embedding goes with the first group, the norm and the head with the last.
    return [0, *(bound + 1 for bound in bounds[1:-1]), bounds[-1] + 3]


def cut_into_stages(
    config: ModelConfig, interval: int | None, length: int, attention_share: float, stages: int
) -> list[Stage]:
    """Return the stages of a pipeline; the arguments are those of ``stage_bounds``."""
    groups = layer_groups(config, interval)
    bounds = _group_bounds(config, interval, length, attention_share, stages)
    return [
        Stage(number=number, count=stages, layers=range(groups[start].start, groups[stop - 1].stop))
        for number, (start, stop) in enumerate(pairwise(bounds))
    ]


def _group_bounds(
    config: ModelConfig, interval: int | None, length: int, attention_share: float, stages: int
) -> list[int]:
    """Return the index in ``layer_groups`` of each stage's first group, followed by the number of groups."""
    layers = [layer_flops_per_token(config, index, length, attention_share).total for index in range(config.num_layers)]
    costs = [sum(layers[i] for i in indices) for indices in layer_groups(config, interval)]
    costs[-1] += forward_flops_per_token(config, length, attention_share).head
    return balanced(costs, stages)


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Return the bounds of ``stages`` consecutive, nonempty runs of ``costs`` whose greatest sum is least.

    Of cuts that are equally good, one with shorter early runs is taken.
    """
    sums = [0.0, *accumulate(costs)]
    best = {(0, 0): (0.0, [0])}
    for stage in range(1, stages + 1):
        for end in range(stage, len(costs) - (stages - stage) + 1):
            least: tuple[float, list[int]] | None = None
            for start in range(end - 1, stage - 2, -1):
                last = sums[end] - sums[start]
                if least is not None and last > least[0]:
                    break  # longer last runs cost more yet
                if (stage - 1, start) in best:
                    cost, bounds = best[stage - 1, start]
                    candidate = (max(cost, last), [*bounds, end])
                    least = candidate if least is None else min(least, candidate)
            assert least is not None
            best[stage, end] = least
    return best[stages, len(costs)][1]
