"""torch.compile of layers, each as one graph, or of the parts of a layer that work row by row.

    one graph           a routed layer of static shapes whose activations are kept; the layer of DCT mixing with its
                        gate; a layer of attention without dropout and documents
    graphs of parts     routers, DCT mixing and feed-forward of the other layers
    not compiled        what is left of those: the host reads how many rows each operator gets (once a layer), and all
                        that follows has that many rows; attention with dropout or documents goes in blocks that the
                        host counts
                        loss and embedding: they go in chunks, with kernels of their own

Layers of one kind share their graphs. Where row counts differ from step to step, their dimension is dynamic after the
first step, and nothing is compiled anew. Whole layers are compiled for training alone: evaluation and passes behind a
cache run them as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from megachiar.model.attention import SelfAttention
from megachiar.model.dct_mixing import DctMixing
from megachiar.model.feed_forward import FeedForward
from megachiar.model.layer import FixedLayer, RoutedLayer
from megachiar.model.router import Router

PARTS = (Router, DctMixing, FeedForward)
NUMBERS_OF_LAYERS = r".*\.(layer|route_key)$"
"""The numbers that each layer has of its own, as torch.compile names where they come from: inputs of a graph."""


def compile_layers(model: nn.Module, backend: str, has_documents: bool, recomputes: bool = False) -> None:
    """Compile layers of ``model``, or the parts of those that cannot be one graph, at their next call.

    Args:
        model: the model or a stage of it, whose layers know already whether their shapes are static.
        backend: of torch.compile.
        has_documents: whether tokens see their document alone.
        recomputes: whether activations are recomputed in the backward pass. A routed layer then takes routes that it
            was given, by another graph than the one that decides, and must keep the same tensors: its parts are
            compiled instead.
    """
    dynamo = torch._dynamo.config
    dynamo.allow_unspec_int_on_nn_module = True  # one graph for all layers, though each has its number
    if hasattr(torch.compiler.config, "dynamic_sources"):  # else the first layer has a graph of its own
        torch.compiler.config.dynamic_sources = NUMBERS_OF_LAYERS
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex operators")
    for layer in model.modules():
        if not isinstance(layer, FixedLayer | RoutedLayer):
            continue
        if is_one_graph(layer, has_documents, recomputes):
            layer.compute = _compiled_in_training(layer, layer.compute, backend)  # type: ignore[method-assign]
            continue
        for part in layer.modules():
            if isinstance(part, PARTS):
                part.compile(backend=backend, fullgraph=True)


def _compiled_in_training(layer: nn.Module, compute: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Return ``compute`` of ``layer``, compiled where it trains.

    Evaluation asks for passes of any shape, and a graph for each would soon be more than torch.compile keeps.
    """
    compiled = torch.compile(compute, backend=backend, fullgraph=True)
    return lambda *arguments: (compiled if layer.training else compute)(*arguments)


def is_one_graph(layer: FixedLayer | RoutedLayer, has_documents: bool, recomputes: bool) -> bool:
    """Return whether a layer is compiled as a whole; the arguments are those of ``compile_layers``."""
    if isinstance(layer, RoutedLayer):
        return layer.has_static_shapes and not recomputes
    return not isinstance(layer.operator, SelfAttention) or not (has_documents or layer.operator.dropout)
