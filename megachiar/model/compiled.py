"""torch.compile for the parts of a layer that work row by row.

    compiled, each as one graph       routers, DCT mixing, feed-forward
    not compiled, and why             dispatch: the host reads how many rows each operator gets (once a layer), and
                                      everything after it has that many rows
                                      attention: the host reads how its queries are packed, and its blocks with
                                      dropout depend on where they stand; what takes time there is one kernel anyway
                                      loss and embedding: they go in chunks, with kernels of their own

A layer of static shapes (see ``static_layer``) can be traced as one graph, which the tests do; it is not compiled so
yet, as no GPU was at hand to try it.

Row counts differ from step to step: after the first step their dimension is dynamic, and nothing is compiled anew.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from megachiar.model.dct_mixing import DctMixing
from megachiar.model.feed_forward import FeedForward
from megachiar.model.router import Router

COMPILED = (Router, DctMixing, FeedForward)


def compile_parts(model: nn.Module, backend: str) -> None:
    """Compile the parts of ``model`` that are ``COMPILED`` with torch.compile's ``backend`` at their next call."""
    dynamo = torch._dynamo.config
    dynamo.allow_unspec_int_on_nn_module = True  # one graph for all layers, though each has its number
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex operators")
    for module in model.modules():
        if isinstance(module, COMPILED):
            module.compile(backend=backend, fullgraph=True)
