"""How many tokens a model routes otherwise in 16 bits than in fp32.

The entropy is computed in fp32 whatever the model's type. What differs are the rows it is computed of: a token whose H
lies near the threshold may fall on its other side.
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
    """Of one routed layer, over all tokens that were read.

    Attributes:
        layer: its number, the first being 1.
        tokens: how many were read.
        rounded: share of them that take another operator when their row of the fp32 model is rounded.
        whole: share that take another operator when the whole model computes in 16 bits.
        entropy_change: mean change of H by the rounding.
        margin: median distance of H to the nearest threshold in fp32; None where the router has none.
    """

    layer: int
    tokens: int
    rounded: float
    whole: float
    entropy_change: float
    margin: float | None

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@torch.inference_mode()
def routing_flips(
    model: ChiarFormer, dtype: torch.dtype, inputs: np.ndarray, targets: np.ndarray, batch_size: int
) -> list[LayerFlips]:
    """Compare ``model`` with itself in ``dtype``.

    Args:
        model: fp32, in evaluation mode.
        dtype: of 16 bits.
        inputs, targets: windows (n, T) of a text.
        batch_size: windows of a forward pass.
    """
    device = next(model.parameters()).device
    other = copy.deepcopy(model).to(dtype)
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    for start in range(0, len(inputs), batch_size):
        batch = [torch.from_numpy(a[start : start + batch_size]).to(device) for a in (inputs, targets)]
        with _decisions(model) as exact, _decisions(other) as whole:
            model(*batch)
            other(*batch)
        layout = BatchLayout(*batch[0].shape)
        for index, (rows, operator, entropy) in exact.items():
            rounded = other.layers[index].router(rows.to(dtype), layout)
            changes = (rounded.operator != operator, whole[index][1] != operator, (rounded.entropy - entropy).abs())
            seen.setdefault(index, []).append((*changes, _margin(model.layers[index], entropy)))
    return [_summary(index, [torch.cat(part) for part in zip(*parts, strict=True)]) for index, parts in seen.items()]


@contextmanager
def _decisions(model: ChiarFormer) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Rows, operators and entropies of each routed layer's tokens in the pass that is made meanwhile."""
    found = {}

    def record(index: int):
        def hook(_, arguments, decision):
            found[index] = (arguments[0], decision.operator, decision.entropy)

        return hook

    layers = ((i, layer) for i, layer in enumerate(model.layers) if isinstance(layer, RoutedLayer))
    hooks = [layer.router.register_forward_hook(record(i)) for i, layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _margin(layer: RoutedLayer, entropy: torch.Tensor) -> torch.Tensor:
    """Distance (n,) to the nearest threshold; nan without one."""
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
