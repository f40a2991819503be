"""The activations that training keeps of a forward pass for the backward pass.

They are counted in values of the compute dtype, for one token. Three things are left out: tensors that do not grow with
tokens, single numbers per row or head, and the padding of attention's rows. The first are the head's gradient, V * d
values in fp32, which the forward pass computes. Dropout keeps no masks, because they are computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

from megachiar.config.model import ModelConfig

ENTROPY = 5
"""Values that the spectral entropy of a row keeps for each of its channels, where it has a gradient."""


@dataclass(frozen=True)
class TokenActivations:
    """Values kept for one token, by the region of the layer that they belong to, in the words of Megatron.

    Attributes:
        sequence_region: values outside the matrix products that a tensor-parallel group shares. Every rank of the group
            keeps all of them; with sequence parallelism only the rank that holds the token does.
        tensor_region: values between those products. A rank keeps its share of them, for all tokens.
    """

    sequence_region: float
    tensor_region: float

    def per_rank(self, tensor_size: int, sequence: bool) -> float:
        """Return the values per token of a micro-batch that each rank of a tensor-parallel group keeps.

        ``sequence`` says whether the group uses sequence parallelism.
        """
        return self.sequence_region / (tensor_size if sequence else 1) + self.tensor_region / tensor_size

    def __add__(self, other: TokenActivations) -> TokenActivations:
        return TokenActivations(
            sequence_region=self.sequence_region + other.sequence_region,
            tensor_region=self.tensor_region + other.tensor_region,
        )


def layer_activations(
    config: ModelConfig, index: int, attention_share: float, static_shapes: bool = False
) -> TokenActivations:
    """Return the activations of layer ``index`` (from 0).

    Args:
        config: config of the model.
        index: number of the layer.
        attention_share: the share of a routed layer's tokens that take attention.
        static_shapes: whether the shapes of routed layers do not depend on the routes (``training.static_shapes``).
    """
    d = config.hidden_size
    # Input and the sum that is normed; the product with W1 and what gelu makes of it.
    feed_forward = TokenActivations(2 * d, 2 * config.ffn_size)
    if config.kind == "chiar" and index == 0:
        gate = {"none": 0, "batch": 2, "causal": 3}[config.meta_router.pool]
        return feed_forward + TokenActivations((2 + gate) * d, 0)
    if index not in config.routed_layers:
        # Input and the sum that is normed; keys, values, rotated keys, rotated queries and the result.
        return feed_forward + TokenActivations(2 * d, 5 * d)
    if static_shapes:
        return feed_forward + _operators_of_static_shapes(config)
    return feed_forward + _routed_operators(config, attention_share)


def _operators_of_static_shapes(config: ModelConfig) -> TokenActivations:
    """Return the activations of a routed layer's router and operators whose tensors all have a row for each token."""
    d = config.hidden_size
    # Input, and the sum that is normed; with norm: pre the rows that the operators take, and those of all keys.
    rows = (3 if config.norm == "pre" and config.attention.keys == "all" else 2) * d
    if config.router.collapse_weight:
        rows += ENTROPY * d
    # Rotated queries and keys, values, and results. They are rotated in place.
    return TokenActivations(rows, 4 * d)


def _routed_operators(config: ModelConfig, attention_share: float) -> TokenActivations:
    """Return the activations of a routed layer's router and operators."""
    d, kind, features = config.hidden_size, config.router.kind, config.rbf.features
    queries, mixed = (1.0, 1.0) if kind == "soft" else (attention_share, 1 - attention_share)
    # Input, spectra, the sums that are normed, and results: to blend, or as rows in the operators' order.
    rows = d + mixed * d + (queries + mixed) * d + (len(config.router.operators) if kind == "soft" else 1) * d
    if kind in ("soft", "hard") or config.router.collapse_weight:
        rows += ENTROPY * d
    if kind in ("soft", "hard"):
        rows += d  # input of the gate
    if kind == "hard":  # results of the operators, taken and not taken, for the gradient of the gates
        results = attention_share if config.router.hard_gradient == "dct_only" else len(config.router.operators) - 1
        rows += (1 + results) * d
    if kind == "learned":  # features of the head; of explored rows both results, their difference and what goes on
        explored = config.router.explore
        queries += explored * (1 - queries)
        rows += d + explored * 4 * d
    if "rbf" in config.router.operators:
        rows += 3 * features + mixed * 4 * features
    if config.attention.keys == "routed":
        # Rotated queries and keys, values and results, all of them packed as well; results in token order.
        return TokenActivations(rows, queries * 5 * d)
    # Keys, values and rotated keys; queries in order, results, and results in token order.
    return TokenActivations(rows, 3 * d + queries * 3 * d)


def head_activations(config: ModelConfig) -> TokenActivations:
    """Return the activations after the last layer: the input of the last norm, and the gradient at its output.

    The embedding, before the first layer, keeps no activations.
    """
    return TokenActivations(2 * config.hidden_size, 0)
