"""Which models train with shapes that do not depend on the routes (see ``static_layer``)."""

from __future__ import annotations

from torch import nn

from megachiar.model.layer import RoutedLayer


def use_static_shapes(model: nn.Module) -> None:
    """Let all routed layers of ``model`` compute with static shapes from now on, in every pass without a cache."""
    for module in model.modules():
        if isinstance(module, RoutedLayer):
            module.has_static_shapes = True
