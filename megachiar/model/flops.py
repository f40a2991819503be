"""How much a model computes.

Protocol: a multiply-add is 2 FLOPs. Matrix products, attention products and the transforms count; norms, activations,
softmax and the router's comparisons do not. Causal attention counts the (T + 1) / 2 keys that a query sees on average,
whatever a kernel computes and masks. A DCT or its inverse counts 2.5 d log2 d, the FFT's number, whatever computes it.
The backward pass is twice the forward pass.

``attention_share`` is the share of all layers' tokens that take attention, as a run logs it on average: the first
(DCT) and last (attention) layer are part of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megachiar.config.model import ModelConfig


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token through the whole model, by part."""

    attention: float
    spectral: float
    feed_forward: float
    head: float

    @property
    def operators(self) -> float:
        """Of the operator sub-layers alone: what routing can save."""
        return self.attention + self.spectral

    @property
    def total(self) -> float:
        return self.operators + self.feed_forward + self.head


def forward_flops_per_token(config: ModelConfig, sequence_length: int, attention_share: float) -> TokenFlops:
    """FLOPs of one token's forward pass, mean over a sequence of ``sequence_length`` tokens."""
    d, layers = config.hidden_size, config.num_layers
    routed, attention_layers = len(config.routed_layers), _layers_with_attention(config)
    transform = 2.5 * d * math.log2(d)
    queries = layers * attention_share  # layers in which the mean token is a query
    keys = (sequence_length + 1) / 2
    attention = queries * (2 * 2 * d * d + 2 * 2 * d * keys) + attention_layers * 2 * 2 * d * d
    # The router transforms every token of its layer; mixing then needs the inverse alone. Layer 1 needs both.
    mixed = layers - queries
    spectral = (routed + mixed + (config.kind == "chiar")) * transform
    return TokenFlops(attention, spectral, layers * 2 * 2 * d * config.ffn_size, 2 * d * config.vocab_size)


def training_flops_per_token(config: ModelConfig, sequence_length: int, attention_share: float) -> float:
    """FLOPs of one token's forward and backward pass: three times the forward pass."""
    return 3 * forward_flops_per_token(config, sequence_length, attention_share).total


def _layers_with_attention(config: ModelConfig) -> int:
    """Layers that make keys and values of every token."""
    return config.num_layers - 1 if config.kind == "chiar" else config.num_layers
