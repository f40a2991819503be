"""Which layers each stage of a pipeline gets: the costliest stage costs as little as it can."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from megachiar.config.model import ModelConfig
from megachiar.planning.flops import forward_flops_per_token, layer_flops_per_token


def layer_groups(config: ModelConfig, interval: int | None) -> list[range]:
    """Layers that a pipeline does not part: those whose activations are recomputed together."""
    step = interval or 1
    return [range(start, min(start + step, config.num_layers)) for start in range(0, config.num_layers, step)]


def stage_bounds(config: ModelConfig, interval: int | None, length: int, share: float, stages: int) -> list[int]:
    """Parts of ``pipeline_parts`` at which stages begin, and their number: the costliest stage costs least.

    Args:
        config: of the model.
        interval: as in ``pipeline_parts``.
        length: tokens of a sequence.
        share: of a routed layer's tokens that take attention, as far as is known.
        stages: at most as many as ``layer_groups``.
    """
    bounds = _group_bounds(config, interval, length, share, stages)
    # Parts: the embedding goes with the first group, the norm and the head with the last.
    return [0, *(bound + 1 for bound in bounds[1:-1]), bounds[-1] + 3]


def stage_layers(config: ModelConfig, interval: int | None, length: int, share: float, stages: int) -> list[range]:
    """Layers of each stage; arguments as of ``stage_bounds``."""
    groups = layer_groups(config, interval)
    bounds = _group_bounds(config, interval, length, share, stages)
    return [range(groups[a].start, groups[b - 1].stop) for a, b in pairwise(bounds)]


def _group_bounds(config: ModelConfig, interval: int | None, length: int, share: float, stages: int) -> list[int]:
    """Groups of layers at which stages begin, and their number."""
    layers = [layer_flops_per_token(config, index, length, share).total for index in range(config.num_layers)]
    costs = [sum(layers[i] for i in indices) for indices in layer_groups(config, interval)]
    costs[-1] += forward_flops_per_token(config, length, share).head
    return balanced(costs, stages)


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Bounds of ``stages`` runs of ``costs``, none empty, whose greatest sum is least; early runs take the ties."""
    sums = [0.0, *accumulate(costs)]
    best = {(0, 0): (0.0, [0])}
    for stage in range(1, stages + 1):
        for end in range(stage, len(costs) - (stages - stage) + 1):
            best[stage, end] = min(
                (max(best[stage - 1, start][0], sums[end] - sums[start]), [*best[stage - 1, start][1], end])
                for start in range(stage - 1, end)
                if (stage - 1, start) in best
            )
    return best[stages, len(costs)][1]
