"""torch.compile of layers, each as one graph, or of the parts of a layer that work row by row.

    one graph           a routed layer of static shapes; the layer of DCT mixing with its gate; a layer of attention
                        without dropout and documents
    graphs of parts     routers, DCT mixing and feed-forward of the other layers
    not compiled        what is left of those: the host reads how many rows each operator gets (once a layer), and all
                        that follows has that many rows; attention with dropout or documents goes in blocks that the
                        host counts
                        loss and embedding: they go in chunks, with kernels of their own

Layers of one kind share their graphs. Where row counts differ from step to step, their dimension is dynamic after the
first step, and nothing is compiled anew. A pass behind a cache runs whole layers uncompiled.
"""

from __future__ import annotations

import warnings

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


def compile_layers(model: nn.Module, backend: str, has_documents: bool) -> None:
    """Compile layers of ``model``, or the parts of those that cannot be one graph, at their next call.

    Args:
        model: the model or a stage of it, whose layers know already whether their shapes are static.
        backend: of torch.compile.
        has_documents: whether tokens see their document alone.
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
        if is_one_graph(layer, has_documents):
            layer.compute = torch.compile(layer.compute, backend=backend, fullgraph=True)  # type: ignore[method-assign]
            continue
        for part in layer.modules():
            if isinstance(part, PARTS):
                part.compile(backend=backend, fullgraph=True)


def is_one_graph(layer: FixedLayer | RoutedLayer, has_documents: bool) -> bool:
    """Return whether a layer is compiled as a whole; the arguments are those of ``compile_layers``."""
    if isinstance(layer, RoutedLayer):
        return layer.has_static_shapes
    return not isinstance(layer.operator, SelfAttention) or not (has_documents or layer.operator.dropout)
