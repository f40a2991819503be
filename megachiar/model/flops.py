"""How much a model computes.

Protocol: a multiply-add is 2 FLOPs. Matrix products, attention products and the transforms count; norms, activations,
softmax, rotations and the router's comparisons do not. A DCT or its inverse counts 2.5 d log2 d, the FFT's number,
whatever computes it. The backward pass is twice the forward pass.

Causal attention counts the (T + 1) / 2 keys that a query sees on average, T being those that give keys. With
``count_masked`` it counts all T, as papers often do and as a counter does that watches a kernel without causal
skipping; savings by routing look larger by it at long sequences.

In the FLOPs, ``attention_share`` is the share of all layers' tokens that take attention, as a run logs it on average:
the first (DCT) and last (attention) layer are part of it.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace

from megachiar.config.model import ModelConfig


@dataclass(frozen=True)
class TokenFlops:
    """Forward FLOPs of one token through the whole model, by part.

    Attributes:
        attention: projections and products; of them ``products`` are those of queries with keys and values.
        products: see there.
        spectral: transforms, for routing and for mixing.
        feed_forward: of all layers.
        head: the logits.
    """

    attention: float
    products: float
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


def forward_flops_per_token(
    config: ModelConfig, sequence_length: int, attention_share: float, *, count_masked: bool = False
) -> TokenFlops:
    """FLOPs of one token's forward pass, mean over a sequence of ``sequence_length`` tokens."""
    routed = len(config.routed_layers)
    share = (attention_share * config.num_layers - 1) / routed if routed else 1.0
    parts = [
        layer_flops_per_token(config, index, sequence_length, share, count_masked=count_masked)
        for index in range(config.num_layers)
    ]
    stack = TokenFlops(*(sum(values) for values in zip(*map(astuple, parts), strict=True)))
    return replace(stack, head=2 * config.hidden_size * config.vocab_size)


def layer_flops_per_token(
    config: ModelConfig, index: int, sequence_length: int, attention_share: float, *, count_masked: bool = False
) -> TokenFlops:
    """FLOPs of one token's forward pass in layer ``index``; ``attention_share`` is that of routed layers' tokens."""
    d = config.hidden_size
    transform = 2.5 * d * math.log2(d)
    routed, spectral_only = index in config.routed_layers, config.kind == "chiar" and index == 0
    share = 0.0 if spectral_only else attention_share if routed else 1.0
    with_keys = share if routed and config.attention.keys == "routed" else float(not spectral_only)
    seen = with_keys * sequence_length
    products = share * 2 * 2 * d * (seen if count_masked else (seen + 1) / 2)
    projections = (share + with_keys) * 2 * 2 * d * d
    # The router transforms every token of its layer; mixing then needs the inverse alone. Layer 1 needs both.
    spectral = (routed + (1 - share) + spectral_only) * transform
    return TokenFlops(projections + products, products, spectral, 2 * 2 * d * config.ffn_size, 0.0)


def training_flops_per_token(config: ModelConfig, sequence_length: int, attention_share: float) -> float:
    """FLOPs of one token's forward and backward pass: three times the forward pass."""
    return 3 * forward_flops_per_token(config, sequence_length, attention_share).total
