"""Count the tokens that a model routes differently in 16 bits and in fp32.

The entropy H is computed in fp32 whatever the model's dtype. The hidden states it is computed from differ: a token
whose H is near the threshold may end on its other side.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch

from megachiar.model import ChiarFormer
from megachiar.model.batch_layout import BatchLayout
from megachiar.model.layer import RoutedLayer


@dataclass(frozen=True)
class LayerFlips:
    """The flips of one routed layer, over all tokens that were read.

    Attributes:
        layer: number of the layer; the first layer of the model is 1.
        tokens: number of tokens read.
        rounded: share of tokens that take another operator when their hidden state in the fp32 model is rounded.
        whole: share of tokens that take another operator when the whole model computes in 16 bits.
        entropy_change: mean absolute change of H through the rounding.
        margin: median distance of H in fp32 to the nearest threshold; None where the router has no threshold.
    """

    layer: int
    tokens: int
    rounded: float
    whole: float
    entropy_change: float
    margin: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the fields by name, as ``--json`` prints them."""
        return asdict(self)


@torch.inference_mode()
def routing_flips(
    model: ChiarFormer, dtype: torch.dtype, inputs: np.ndarray, targets: np.ndarray, batch_size: int
) -> list[LayerFlips]:
    """Compare the routes of ``model`` with those of its copy in ``dtype``.

    Args:
        model: fp32, in evaluation mode.
        dtype: of 16 bits.
        inputs: windows of a text, int64 (n, T).
        targets: of these windows, int64 (n, T).
        batch_size: number of windows in a forward pass.

    Returns:
        The flips of each routed layer, in the order of the layers.
    """
    device = next(model.parameters()).device
    other = copy.deepcopy(model).to(dtype)
    layers, other_layers = _routed_layers(model), _routed_layers(other)
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    for start in range(0, len(inputs), batch_size):
        batch = [torch.from_numpy(a[start : start + batch_size]).to(device) for a in (inputs, targets)]
        with _decisions(model) as exact, _decisions(other) as whole:
            model(*batch)
            other(*batch)
        layout = BatchLayout(*batch[0].shape)
        for index, (rows, operator, entropy) in exact.items():
            rounded = other_layers[index].router(rows.to(dtype), layout)
            changes = (rounded.operator != operator, whole[index][1] != operator, (rounded.entropy - entropy).abs())
            seen.setdefault(index, []).append((*changes, _margin(layers[index], entropy)))
    return [_summary(index, [torch.cat(part) for part in zip(*parts, strict=True)]) for index, parts in seen.items()]


def _routed_layers(model: ChiarFormer) -> dict[int, RoutedLayer]:
    """Return the routed layers of ``model`` by index."""
    return {index: layer for index, layer in enumerate(model.layers) if isinstance(layer, RoutedLayer)}


@contextmanager
def _decisions(model: ChiarFormer) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Record the forward pass that is made within the context.

    Yields:
        Router input (tokens, d), operators (tokens,) and entropies (tokens,) of each routed layer, by its index.
    """
    found: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def record(index: int):
        def hook(_, arguments, decision):
            found[index] = (arguments[0], decision.operator, decision.entropy)

        return hook

    hooks = [layer.router.register_forward_hook(record(index)) for index, layer in _routed_layers(model).items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _margin(layer: RoutedLayer, entropy: torch.Tensor) -> torch.Tensor:
    """Return the distance of each entropy (tokens,) to the nearest threshold; nan if the layer has no threshold."""
    if layer.router.kind != "threshold":
        return torch.full_like(entropy, torch.nan)
    return torch.stack([(entropy - bound).abs() for bound in layer.router.bounds]).amin(0)


def _summary(index: int, parts: list[torch.Tensor]) -> LayerFlips:
    rounded, whole, change, margin = (part.double() for part in parts)
    median = margin.median().item()
    return LayerFlips(
        layer=index + 1,
        tokens=len(rounded),
        rounded=rounded.mean().item(),
        whole=whole.mean().item(),
        entropy_change=change.mean().item(),
        margin=None if median != median else median,
    )
