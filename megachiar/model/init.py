"""Initial weights: each parameter from a generator keyed by seed and name, whatever order or layout builds it."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.model.embedding import TiedEmbedding
from megachiar.model.meta_router import MetaRouter
from megachiar.model.rbf import RbfMixing

INTENDED_GATE_BIAS = 2.0


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill ``model``: normal(0, initializer_std) for linear and embedding weights, zero biases."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, TiedEmbedding)):
            _draw(module.weight, config.initializer_std, seed, f"{name}.weight")
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
        elif isinstance(module, RbfMixing):
            _draw(module.frequencies, module.spread, seed, f"{name}.frequencies")
    for module in model.modules():  # after its nn.Linear has been filled
        if isinstance(module, MetaRouter) and config.meta_router.init == "intended":
            module.gate.weight.zero_()
            module.gate.bias.fill_(INTENDED_GATE_BIAS)


def _draw(tensor: torch.Tensor, std: float, seed: int, name: str) -> None:
    """Fill with normal(0, std) at full shape, drawn on the CPU in fp32: the same on every device and in every type."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    tensor.copy_(torch.empty(tensor.shape, dtype=torch.float32).normal_(0, std, generator=generator))
