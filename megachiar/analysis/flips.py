"""Count the tokens that a model routes differently in 16 bits and in fp32.

The entropy H is computed in fp32 whatever the model's dtype. The hidden states it is computed from differ: a token
whose H is near the threshold may end on its other side.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from megachiar.analysis.windows import Windows, tokens_that_count
from megachiar.model import ChiarFormer
from megachiar.model.batch_layout import BatchLayout
from megachiar.model.layer import RoutedLayer
from megachiar.model.router import RoutingDecision


@dataclass(frozen=True)
class LayerFlips:
    """The flips of one routed layer, over all tokens that were read.

    Attributes:
        layer: number of the layer; the first layer of the model is 1.
        tokens: number of tokens read.
        rounded: share of tokens that take another operator when their hidden state in the fp32 model is rounded.
        whole: share of tokens that take another operator when the whole model computes in 16 bits.
        entropy_change: mean absolute change of H through the rounding; of a hashed router's H of the permuted channels.
        margin: median distance of that H in fp32 to the nearest threshold; None where the router has no threshold.
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
def routing_flips(model: ChiarFormer, dtype: torch.dtype, windows: Windows, batch_size: int) -> list[LayerFlips]:
    """Compare the routes of ``model`` with those of its copy in ``dtype``.

    Args:
        model: fp32, in evaluation mode.
        dtype: of 16 bits.
        windows: of a text, or examples, of which padding is left out unless their task counts it.
        batch_size: number of windows in a forward pass.

    Returns:
        The flips of each routed layer, in the order of the layers.
    """
    device = next(model.parameters()).device
    other = copy.deepcopy(model).to(dtype)
    layers, other_layers = _routed_layers(model), _routed_layers(other)
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    for start in range(0, len(windows.inputs), batch_size):
        part = Windows(*(values[start : start + batch_size] for values in windows))
        batch = [torch.from_numpy(values).to(device) for values in part]
        counted = torch.from_numpy(tokens_that_count(model, part)[1]).to(device)
        with _decisions(model) as exact, _decisions(other) as whole:
            model(*batch, head=windows.head)
            other(*batch, head=windows.head)
        for index, (rows, layout, decision) in exact.items():
            rounded = other_layers[index].router(rows.to(dtype), layout)
            changes = (_changed(one, decision) for one in (rounded, whole[index].decision))
            entropy = _entropy(layers[index], decision)
            change = (_entropy(layers[index], rounded) - entropy).abs()
            numbers = (*changes, change, _margin(layers[index], entropy))
            seen.setdefault(index, []).append(tuple(values[counted] for values in numbers))
    return [_summary(index, [torch.cat(part) for part in zip(*parts, strict=True)]) for index, parts in seen.items()]


def _changed(one: RoutingDecision, other: RoutingDecision) -> torch.Tensor:
    """Return which rows (m,) two decisions send to different operators."""
    assert one.operator is not None, "a router without a partition decides"
    assert other.operator is not None, "a router without a partition decides"
    return one.operator != other.operator


def _routed_layers(model: ChiarFormer) -> dict[int, RoutedLayer]:
    """Return the routed layers of ``model`` by index."""
    return {index: layer for index, layer in enumerate(model.layers) if isinstance(layer, RoutedLayer)}


class _Decided(NamedTuple):
    """A router's input rows (tokens, d) with their layout, and its decision about them."""

    rows: torch.Tensor
    layout: BatchLayout
    decision: RoutingDecision


@contextmanager
def _decisions(model: ChiarFormer) -> Iterator[dict[int, _Decided]]:
    """Record the forward pass that is made within the context; yield what each routed layer decided, by its index."""
    found: dict[int, _Decided] = {}

    def record(index: int):
        def hook(_, arguments, decision):
            rows, layout = arguments
            found[index] = _Decided(rows, layout, decision)

        return hook

    hooks = [layer.router.register_forward_hook(record(index)) for index, layer in _routed_layers(model).items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _entropy(layer: RoutedLayer, decision: RoutingDecision) -> torch.Tensor:
    """Return H (tokens,) as the layer compares it with thresholds, or H of the rows if the layer has no threshold."""
    return decision.entropy if decision.score is None or not layer.router.has_thresholds else decision.score


def _margin(layer: RoutedLayer, entropy: torch.Tensor) -> torch.Tensor:
    """Return the distance of each entropy (tokens,) to the nearest threshold; nan if the layer has no threshold."""
    if not layer.router.has_thresholds:
        return torch.full_like(entropy, torch.nan)
    return torch.stack([(entropy - bound).abs() for bound in layer.router.thresholds()]).amin(0)


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
