"""Initial weights: each parameter comes from a generator of its own, keyed by the run's seed and the parameter's name.

The weights then do not depend on the order or the layout that a model is built in.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.model.embedding import TiedEmbedding
from megachiar.model.meta_router import MetaRouter
from megachiar.model.rbf_mixing import RbfMixing
from megachiar.parallel.shard import shard_of
from megachiar.topology import TensorParallelGroup

INTENDED_GATE_BIAS = 2.0
"""Initial bias of the MetaRouter's gate with ``meta_router.init: intended``; its weight is 0 then."""


@torch.no_grad()
def initialise(root: nn.Module, config: ModelConfig, seed: int, group: TensorParallelGroup, prefix: str = "") -> None:
    """Fill ``root`` with initial weights: normal(0, initializer_std) for linear layers and embeddings, zero for biases.

    Args:
        root: the model or a part of it.
        config: the model's config.
        seed: the run's seed.
        group: the ranks that share the parameters; each takes its part of the whole parameter's numbers.
        prefix: what goes before a name within ``root`` to make it the name in the model.
    """

    def draw(tensor: torch.Tensor, std: float, name: str) -> None:
        _draw(tensor, std, seed, f"{prefix}{name}".strip("."), group)

    for name, module in root.named_modules():
        if isinstance(module, (nn.Linear, TiedEmbedding)):
            draw(module.weight, config.initializer_std, f"{name}.weight")
            bias = getattr(module, "bias", None)
            if bias is not None:
                bias.zero_()
        elif isinstance(module, RbfMixing):
            draw(module.frequencies, module.spread, f"{name}.frequencies")
    for module in root.modules():  # after the gate, which is an nn.Linear, has been filled
        if isinstance(module, MetaRouter) and config.meta_router.init == "intended":
            module.gate.weight.zero_()
            module.gate.bias.fill_(INTENDED_GATE_BIAS)


def _draw(tensor: torch.Tensor, std: float, seed: int, name: str, group: TensorParallelGroup) -> None:
    """Fill ``tensor`` with its part of normal(0, std) numbers.

    They are drawn for the whole parameter, on the CPU and in fp32: the same on every device and in every type.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    shard = shard_of(tensor)
    shape = tensor.shape if shard is None else shard.whole_shape(tensor.shape, group.size)
    whole = torch.empty(shape, dtype=torch.float32).normal_(0, std, generator=generator)
    tensor.copy_(whole if shard is None else shard.part(whole, group.rank, group.size))
