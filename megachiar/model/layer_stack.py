"""The layers of the model as one list; each rank runs the part that it holds.

    embedding | layers.0 | layers.1 | ... | layers.L-1 | norm | embedding (the tied head)

One rank or tensor-parallel group runs the whole list as ``ChiarFormer``. A pipeline gives each stage a part of it; the
names of the parameters are the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megachiar.config.model import ModelConfig
from megachiar.kernels import gpu
from megachiar.kernels.spectral import filter_matrices
from megachiar.model.batch_layout import BatchLayout
from megachiar.model.dct_mixing import DctMixing
from megachiar.model.kv_cache import DecodingCache
from megachiar.model.layer import FixedLayer, LayerOutput, RoutedLayer, Routes
from megachiar.topology import TensorParallelGroup


class RoutingStatistics(NamedTuple):
    """The statistics of the routers in a forward pass.

    Each field is (layers,) fp32, of this rank's rows, without gradient.

    Attributes:
        attention_share, rbf_share: the share of tokens that took the operator.
        entropy: the mean spectral entropy H; nan where a layer does not route.
        gate: the mean gate g of the MetaRouter; nan where a layer has none.
        real_share: the share of the micro-batch's rows that are no padding, the same in all layers.
    """

    attention_share: torch.Tensor
    rbf_share: torch.Tensor
    entropy: torch.Tensor
    gate: torch.Tensor
    real_share: torch.Tensor

    def summable(self) -> torch.Tensor:
        """Return (5, layers) fp64 whose sums over micro-batches and ranks give the means over all real rows.

        The statistics are weighted by the share of real rows, which comes last as it is.
        """
        *means, real_share = (statistic.double() for statistic in self)
        return torch.stack([*(mean * real_share for mean in means), real_share])


def build_layer(config: ModelConfig, index: int, group: TensorParallelGroup) -> nn.Module:
    """Build layer ``index`` (from 0).

    A ``chiar`` model has DCT mixing in its first layer, routers in the layers after it and attention in its last one. A
    ``baseline`` has attention in every layer.
    """
    if index in config.routed_layers:
        return RoutedLayer(config, index, group)
    is_first_of_chiar = config.kind == "chiar" and index == 0
    return FixedLayer(config, index, "dct" if is_first_of_chiar else "attention", group)


def run_layers(
    layers: Sequence[nn.Module],
    x: torch.Tensor,
    layout: BatchLayout,
    cache: DecodingCache | None,
    interval: int | None,
    routes: Routes | None = None,
) -> tuple[torch.Tensor, list[LayerOutput]]:
    """Run ``layers`` one after another.

    Args:
        layers: consecutive layers of the model.
        x: hidden states (m, d) of this rank's rows.
        layout: the layout of the micro-batch.
        cache: of earlier positions; None in training.
        interval: number of layers that are recomputed together in the backward pass; None keeps all activations. Of
            such a group only the input is kept. The second forward pass takes the same routes, and has the same
            dropout, since its masks are functions of keys.
        routes: routes that layers take instead of deciding, see ``Routes``; None lets all routers decide.

    Returns:
        Hidden states (m, d) after the last layer, and the outputs of the layers without their hidden states.
    """
    are_static = cache is None and any(_is_static(layer) for layer in layers)
    matrices = _filter_matrices(layers) if are_static else [None] * len(layers)
    if cache is None and (are_static or gpu.has_kernels(x.device)):
        layout = layout.with_document_rows()
    if interval is None or not torch.is_grad_enabled():
        return _run(layers, x, layout, cache, routes, matrices)
    outputs: list[LayerOutput] = []
    for start in range(0, len(layers), interval):
        end, taken = start + interval, Routes() if routes is None else routes
        arguments = x, layout, cache, taken, matrices[start:end]
        x, reported = checkpoint(_run, layers[start:end], *arguments, use_reentrant=False, preserve_rng_state=False)
        outputs += reported
    return x, outputs


def _is_static(layer: nn.Module) -> bool:
    return isinstance(layer, RoutedLayer) and layer.has_static_shapes


def _filter_matrices(layers: Sequence[nn.Module]) -> list[torch.Tensor | None]:
    """Return the filters of layers as matrices (d, d), by one batched product; None for layers without a filter."""
    operators = [layer.dct if isinstance(layer, RoutedLayer) else layer.operator for layer in layers]
    mixing = [operator for operator in operators if isinstance(operator, DctMixing)]
    made = iter(filter_matrices(torch.stack([dct.filter for dct in mixing]), mixing[0].gain).unbind())
    return [next(made) if isinstance(operator, DctMixing) else None for operator in operators]


def _run(
    layers: Sequence[nn.Module],
    x: torch.Tensor,
    layout: BatchLayout,
    cache: DecodingCache | None,
    routes: Routes | None,
    matrices: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, list[LayerOutput]]:
    outputs = []
    for layer, matrix in zip(layers, matrices, strict=True):
        output = layer(x, layout, cache, routes, matrix)
        x = output.hidden_states
        outputs.append(output._replace(hidden_states=None))
    return x, outputs


def total_regulariser(outputs: Sequence[LayerOutput], device: torch.device) -> torch.Tensor:
    """Return the sum () of the layers' regularisers: zero in fp32 where no layer has one."""
    added = [output.regulariser for output in outputs if output.regulariser is not None]
    return functools.reduce(torch.add, added) if added else torch.zeros((), dtype=torch.float32, device=device)


def statistics(outputs: Sequence[LayerOutput], layout: BatchLayout, device: torch.device) -> RoutingStatistics:
    """Collect the statistics of all layers for a micro-batch of ``layout`` on ``device``.

    A pass behind a cache measures nothing: each statistic of it is empty, (0,).
    """
    if layout.cached_positions is not None:
        return RoutingStatistics(*[torch.empty(0, device=device)] * 5)
    outputs = _with_measured(outputs, layout)

    def collect(name: str) -> torch.Tensor:
        values = [getattr(output, name) for output in outputs]
        if not any(torch.is_tensor(value) for value in values) and len(set(values)) == 1:
            return torch.full((len(values),), values[0], dtype=torch.float32, device=device)
        # Filled, not copied: a copy from the host would wait for all that the GPU has to do.
        numbers = {value for value in values if not torch.is_tensor(value)}
        filled = {value: torch.full((), value, dtype=torch.float32, device=device) for value in numbers}
        return torch.stack([value if torch.is_tensor(value) else filled[value] for value in values]).detach().float()

    attention_share = collect("attention_share")
    real_share = torch.ones_like(attention_share)
    if layout.lengths is not None:
        real_share = real_share * (layout.lengths.sum() / layout.num_rows)
    return RoutingStatistics(
        attention_share=attention_share,
        rbf_share=collect("rbf_share"),
        entropy=collect("entropy"),
        gate=collect("gate"),
        real_share=real_share,
    )


def _with_measured(outputs: Sequence[LayerOutput], layout: BatchLayout) -> list[LayerOutput]:
    """Fill in the share of attention and the mean of H of layers of static shapes, for all of them at once."""
    measured = [output.partitioned for output in outputs if output.partitioned is not None]
    if not measured:
        return list(outputs)
    shares = iter((torch.cat([of_layer.attention_rows for of_layer in measured]).float() / layout.num_rows).unbind())
    entropies = iter(torch.stack([of_layer.entropy for of_layer in measured]).float().mean(1).unbind())
    return [
        output
        if output.partitioned is None
        else output._replace(attention_share=next(shares), entropy=next(entropies), partitioned=None)
        for output in outputs
    ]
