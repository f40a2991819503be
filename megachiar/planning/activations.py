"""What training keeps of a forward pass for the backward pass.

Counted in values of the compute type, for one token. Left out: what does not grow with tokens (the head's gradient,
V * d values in fp32, is computed in the forward pass), one number per row or head, and padding of attention's rows.
Dropout keeps no mask: masks are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

from megachiar.config.model import ModelConfig


@dataclass(frozen=True)
class KeptValues:
    """Values kept for one token.

    Attributes:
        rows: d numbers wide, outside the products that a tensor group shares. Every rank of the group keeps them, or
            with sequence parallelism the token's owner alone.
        features: between these products: a rank keeps its share of them, for all tokens.
    """

    rows: float
    features: float

    def on_a_rank(self, tensor_size: int, sequence: bool) -> float:
        """Values a token of the micro-batch on each rank of a tensor group."""
        return self.rows / (tensor_size if sequence else 1) + self.features / tensor_size

    def __add__(self, other: KeptValues) -> KeptValues:
        return KeptValues(self.rows + other.rows, self.features + other.features)


def layer_activations(config: ModelConfig, index: int, attention_share: float) -> KeptValues:
    """Of layer ``index`` (from 0); ``attention_share`` is that of the routed layers' tokens."""
    d = config.hidden_size
    # Input and the sum that is normed; the product with W1 and what gelu makes of it.
    feed_forward = KeptValues(2 * d, 2 * config.ffn_size)
    if config.kind == "chiar" and index == 0:
        gate = {"none": 0, "batch": 2, "causal": 3}[config.meta_router.pool]
        return feed_forward + KeptValues((2 + gate) * d, 0)
    if index not in config.routed_layers:
        # Input, the sum that is normed; keys, values, keys rotated, queries rotated, result.
        return feed_forward + KeptValues(2 * d, 5 * d)
    return feed_forward + _routed(config, attention_share)


def _routed(config: ModelConfig, attention_share: float) -> KeptValues:
    d, kind, features = config.hidden_size, config.router.kind, config.rbf.features
    queries, mixed = (1.0, 1.0) if kind == "soft" else (attention_share, 1 - attention_share)
    # Input, spectra, the sums that are normed, results to blend or rows in the operators' order.
    rows = d + mixed * d + (queries + mixed) * d + (len(config.router.operators) if kind == "soft" else 1) * d
    if kind in ("soft", "hard") or config.router.collapse_weight:
        rows += 5 * d  # entropy with a gradient
    if kind in ("soft", "hard"):
        rows += d  # input of the gate
    if "rbf" in config.router.operators:
        rows += 3 * features + mixed * 4 * features
    if config.attention.keys == "routed":
        # Queries and keys rotated, values and results, all of them packed as well; results in order.
        return KeptValues(rows, queries * 5 * d)
    # Keys, values, keys rotated; queries in order, results, results in order.
    return KeptValues(rows, 3 * d + queries * 3 * d)


def end_activations(config: ModelConfig) -> KeptValues:
    """Before the first layer nothing; after the last the input of the norm, and the gradient at its output."""
    return KeptValues(2 * config.hidden_size, 0)
