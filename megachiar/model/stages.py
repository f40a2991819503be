"""The stack as one list of layers, in the order a token passes them."""

from __future__ import annotations

from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.model.layer import FixedLayer, RoutedLayer


def build_layers(config: ModelConfig) -> list[nn.Module]:
    """chiar: DCT only, routed ..., attention only. baseline: attention in every layer."""
    return [_build_layer(config, index) for index in range(config.num_layers)]


def _build_layer(config: ModelConfig, index: int) -> nn.Module:
    name = f"layers.{index}"
    if index in config.routed_layers:
        return RoutedLayer(config, index, name)
    is_first_of_chiar = config.kind == "chiar" and index == 0
    return FixedLayer(config, "dct" if is_first_of_chiar else "attention", name)
