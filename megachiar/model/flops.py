"""How much a model computes, and what training keeps in memory of it.

Protocol: a multiply-add is 2 FLOPs. Matrix products, attention products and the transforms count; norms, activations,
softmax, rotations and the router's comparisons do not. A DCT or its inverse counts 2.5 d log2 d, the FFT's number,
whatever computes it. The backward pass is twice the forward pass.

Causal attention counts the (T + 1) / 2 keys that a query sees on average. With ``count_masked`` it counts all T keys,
as papers often do and as a counter does that watches a kernel without causal skipping; savings by routing look larger
by it at long sequences.

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
    keys = sequence_length if count_masked else (sequence_length + 1) / 2
    products = share * 2 * 2 * d * keys
    projections = share * 2 * 2 * d * d + (not spectral_only) * 2 * 2 * d * d
    # The router transforms every token of its layer; mixing then needs the inverse alone. Layer 1 needs both.
    spectral = (routed + (1 - share) + spectral_only) * transform
    return TokenFlops(projections + products, products, spectral, 2 * 2 * d * config.ffn_size, 0.0)


def training_flops_per_token(config: ModelConfig, sequence_length: int, attention_share: float) -> float:
    """FLOPs of one token's forward and backward pass: three times the forward pass."""
    return 3 * forward_flops_per_token(config, sequence_length, attention_share).total


def activation_values_per_token(config: ModelConfig, attention_share: float) -> float:
    """Values that one token's forward pass keeps for the backward pass, dropout masks included.

    Counted in the compute type. Left out: what does not grow with tokens (the head's gradient, V * d values in fp32,
    is computed in the forward pass), one number per row or head, padding of attention's rows, and attention
    probabilities: fused kernels keep none, but PyTorch's CPU attention with dropout keeps 3 h T values a query.

    Args:
        config: of the model.
        attention_share: of the routed layers' tokens.
    """
    d, features, masks = config.hidden_size, config.rbf.features, config.dropout > 0
    # Input, its product with W1, what gelu makes of it, the sum that is normed; a mask after gelu and after W2.
    feed_forward = 2 * d + 2 * config.ffn_size + masks * (config.ffn_size + d)
    keys_values = d + 3 * d  # input; keys, values, and keys rotated
    fixed_attention = keys_values + 3 * d + feed_forward  # query, result, the sum that is normed
    ends = 2 * d + masks * d  # input of the last norm, gradient at its output; mask of the embedding
    if config.kind == "baseline":
        return ends + config.num_layers * fixed_attention
    has_gate = config.meta_router.pool != "none"
    first = 2 * d + feed_forward + has_gate * (2 if config.meta_router.pool == "batch" else 3) * d
    soft = config.router.kind == "soft"
    queries, mixed = (1.0, 1.0) if soft else (attention_share, 1 - attention_share)
    # Queries in order, rotated, results, results in order | spectrum | the sums that are normed.
    routed = keys_values + queries * 3 * d + mixed * d + (queries + mixed) * d + feed_forward
    routed += (len(config.router.operators) if soft else 1) * d  # results to blend, or rows in the operators' order
    if config.router.kind in ("soft", "hard") or config.router.collapse_weight:
        routed += 5 * d  # entropy with a gradient
    if config.router.kind in ("soft", "hard"):
        routed += d  # input of the gate
    if "rbf" in config.router.operators:
        routed += 3 * features + mixed * 4 * features
    return ends + first + len(config.routed_layers) * routed + fixed_attention
