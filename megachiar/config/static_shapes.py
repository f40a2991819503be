"""Which models and layouts can train with shapes that do not depend on the routes (``training.static_shapes``)."""

from __future__ import annotations

from megachiar.config.model import ModelConfig
from megachiar.config.sections import ParallelConfig

OTHER_ROUTERS = {
    "soft": "model.router.kind is soft: every row takes every operator, and no shape depends on a route",
    "hard": "model.router.kind is hard: its gates learn from results of rows that took another operator",
    "learned": "model.router.kind is learned: both operators compute the rows that it explores",
}


def why_shapes_follow_routes(model: ModelConfig, parallel: ParallelConfig) -> str | None:
    """Return why routed layers of a model cannot have static shapes in a layout; None where they can."""
    if len(model.router.operators) > 2:
        return "model.router.operators has three: static shapes are for dct and attention"
    if model.router.kind in OTHER_ROUTERS:
        return OTHER_ROUTERS[model.router.kind]
    if parallel.tensor_size > 1:
        return f"parallel.tensor_size is {parallel.tensor_size}: ranks exchange the rows of each operator"
    if parallel.zero_stage == 3:
        return (
            "parallel.zero_stage is 3: weights are gathered by module, and static shapes use those of several at once"
        )
    return None
