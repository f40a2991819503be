"""The FLOPs of a model.

A multiply-add is 2 FLOPs. Matrix products, attention products and the transforms are counted; norms, activations,
softmax, rotations and the router's comparisons are not. A DCT or its inverse counts 2.5 d log2 d, as many as an FFT
takes, whatever algorithm computes it.

                    forward                                          backward
    products        one                                              two: gradients of the input and of the weight
    attention       two: the scores, and their product with values   four
    DCT mixing      an inverse, and a transform where the router     a transform of the gradient and an inverse
                    has not transformed the same rows
    router          a transform of every row, and one more where     one, where H has a gradient
                    H has a gradient; another one of the permuted
                    row, where the router is hashed
    RBF features    one                                              one: their frequencies are not trained
    gates of a      in training, the operators that a token did      nothing more
    hard router     not take, see router.hard_gradient
    learned router  the prediction; in training both operators       of the prediction: its weight's
                    for the tokens that are explored

These are model FLOPs, the usual measure to compare runs. The scores, which a kernel computes again in the backward
pass, are not counted again. The forward pass of recomputed layers is counted on request.

A causal query sees (T + 1) / 2 keys on average, where T is the number of tokens that give keys, and that many are
counted. With ``count_masked`` all T are counted, as papers often do and as a counter sees them in a kernel that does
not skip masked keys. Routing then seems to save more at long sequences.

H is the spectral entropy, d the number of channels. A soft router computes every operator for every token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from megachiar.config.model import ModelConfig


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token, by part of the model.

    Attributes:
        attention: projections and products of attention.
        products: the part of ``attention`` that multiplies queries with keys and scores with values.
        spectral: transforms, for routing and for DCT mixing.
        rbf: features, products and projection of RBF mixing.
        gates: gates of soft and hard routers and of the MetaRouter, and predictions of learned routers.
        feed_forward: feed-forward sub-layers.
        head: logits.
    """

    attention: float
    products: float
    spectral: float
    rbf: float
    gates: float
    feed_forward: float
    head: float

    @property
    def operators(self) -> float:
        """Return the FLOPs of the operator sub-layers with their routing, which are those that routing can save."""
        return self.attention + self.spectral + self.rbf + self.gates

    @property
    def total(self) -> float:
        """Return the FLOPs of all parts."""
        return self.operators + self.feed_forward + self.head


def forward_flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    attention_share: float,
    rbf_share: float = 0.0,
    *,
    count_masked: bool = False,
    backward: bool = False,
    training: bool = False,
) -> TokenFlops:
    """Return the FLOPs of one token's forward pass, averaged over a sequence.

    Args:
        config: config of the model.
        sequence_length: tokens of the sequence.
        attention_share: share of all layers' tokens that take attention, as a run logs it. The first layer (DCT) and
            the last (attention) are part of it.
        rbf_share: share of all layers' tokens that take RBF mixing.
        count_masked: whether keys are counted that a query does not see.
        backward: whether to count the backward pass instead.
        training: whether the forward pass is that of a training step.
    """
    routed = len(config.routed_layers)
    layers = [
        layer_flops_per_token(
            config,
            index,
            sequence_length,
            attention_share=(attention_share * config.num_layers - 1) / routed if routed else 1.0,
            rbf_share=rbf_share * config.num_layers / routed if routed else 0.0,
            count_masked=count_masked,
            backward=backward,
            training=training,
        )
        for index in range(config.num_layers)
    ]
    return replace(_sum_of(layers), head=(4 if backward else 2) * config.hidden_size * config.vocab_size)


def forward_flops_of_shares(
    config: ModelConfig, sequence_length: int, attention_shares: Sequence[float], rbf_shares: Sequence[float]
) -> TokenFlops:
    """Return the FLOPs of one token's forward pass where the shares of each layer are known.

    Args:
        config: config of the model.
        sequence_length: tokens of the sequence.
        attention_shares: share of each layer's tokens that take attention; that of a fixed layer is not read.
        rbf_shares: the same of RBF mixing.
    """
    layers = [
        layer_flops_per_token(config, index, sequence_length, attention, rbf)
        for index, (attention, rbf) in enumerate(zip(attention_shares, rbf_shares, strict=True))
    ]
    return replace(_sum_of(layers), head=2 * config.hidden_size * config.vocab_size)


def forward_flops_of_attention(config: ModelConfig, sequence_length: int) -> TokenFlops:
    """Return the FLOPs of one token's forward pass if every token of every layer took attention, without a router."""
    everywhere = config.model_copy(update={"kind": "baseline"})
    ones, zeros = [1.0] * config.num_layers, [0.0] * config.num_layers
    return forward_flops_of_shares(everywhere, sequence_length, ones, zeros)


def _sum_of(layers: Sequence[TokenFlops]) -> TokenFlops:
    return TokenFlops(
        **{field.name: sum(getattr(layer, field.name) for layer in layers) for field in fields(TokenFlops)}
    )


def layer_flops_per_token(
    config: ModelConfig,
    index: int,
    sequence_length: int,
    attention_share: float,
    rbf_share: float = 0.0,
    *,
    count_masked: bool = False,
    backward: bool = False,
    training: bool = False,
) -> TokenFlops:
    """Return the FLOPs of one token's pass through layer ``index`` (from 0).

    The shares are those of a routed layer's tokens; other arguments are as in ``forward_flops_per_token``.
    """
    d, router = config.hidden_size, config.router
    is_routed, is_dct_layer = index in config.routed_layers, config.kind == "chiar" and index == 0
    has_rbf = is_routed and "rbf" in router.operators
    has_gate = is_routed and router.kind in ("soft", "hard")
    shares = _operator_shares(config, index, attention_share, rbf_share)
    is_learned = is_routed and router.kind == "learned"
    if is_learned and (training or backward):
        shares = {name: share + router.explore * (1 - share) for name, share in shares.items()} | {"rbf": 0.0}
    passes = 2 if backward else 1

    key_share = shares["attention"] if is_routed and config.attention.keys == "routed" else float(not is_dct_layer)
    seen = _seen_keys(key_share * sequence_length, count_masked)
    products = passes * shares["attention"] * 4 * d * seen
    projections = passes * (shares["attention"] + key_share) * 4 * d * d

    entropy_has_gradient = has_gate or (is_routed and router.collapse_weight > 0)
    needs_transform = is_dct_layer or config.norm == "pre"  # the router has not transformed the rows that are mixed
    if backward:
        transforms = 2 * shares["dct"] + entropy_has_gradient
    else:
        transforms = (1 + needs_transform) * shares["dct"] + entropy_has_gradient
        transforms += is_routed * (2 if router.kind == "hashed" else 1)

    features = config.rbf.features
    rbf_mixing = 8 * features * _seen_keys(sequence_length, count_masked) + 4 * features * d
    rbf = passes * shares["rbf"] * rbf_mixing + has_rbf * 2 * d * features

    if training and router.kind == "hard" and is_routed and not backward:
        transforms += (1 + needs_transform) * (1 - shares["dct"])
        if router.hard_gradient == "published":
            products += (1 - shares["attention"]) * 4 * d * seen
            projections += (1 - shares["attention"] + key_share) * 4 * d * d
            rbf += has_rbf * ((1 - shares["rbf"]) * rbf_mixing + 2 * d * features)

    gates = has_gate * 2 * (d + 1) * len(router.operators)
    prediction = is_learned * 2 * (d + 1)  # in either pass: it has no gradient of its input
    gates += is_dct_layer * (config.meta_router.pool == "causal") * 2 * d
    return TokenFlops(
        attention=projections + products,
        products=products,
        spectral=transforms * transform_flops(d),
        rbf=rbf,
        gates=passes * gates + prediction,
        feed_forward=passes * 4 * d * config.ffn_size,
        head=0.0,
    )


def _operator_shares(config: ModelConfig, index: int, attention_share: float, rbf_share: float) -> dict[str, float]:
    """Return, for each operator, the share of tokens that layer ``index`` computes it for.

    The arguments are the shares of a routed layer. A soft router computes every operator for every token.
    """
    has_rbf = "rbf" in config.router.operators
    if config.kind == "chiar" and index == 0:
        return {"attention": 0.0, "dct": 1.0, "rbf": 0.0}
    if index not in config.routed_layers:
        return {"attention": 1.0, "dct": 0.0, "rbf": 0.0}
    if config.router.kind == "soft":
        return {"attention": 1.0, "dct": 1.0, "rbf": float(has_rbf)}
    rbf_share = rbf_share if has_rbf else 0.0
    return {"attention": attention_share, "dct": 1 - attention_share - rbf_share, "rbf": rbf_share}


def transform_flops(d: int) -> float:
    """Return the FLOPs of a DCT of ``d`` channels, or of its inverse."""
    return 2.5 * d * math.log2(d)


def _seen_keys(keys: float, count_masked: bool) -> float:
    """Return the number of keys that count for a query: all of the sequence, or those that it sees on average."""
    return keys if count_masked else (keys + 1) / 2


def training_flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    attention_share: float,
    rbf_share: float = 0.0,
    *,
    count_masked: bool = False,
    recomputed: bool = False,
    predicts_tokens: bool = True,
) -> float:
    """Return the FLOPs of one token's forward and backward pass.

    Without ``predicts_tokens`` the language model's head is not counted, as in a classification, whose own head takes
    nothing beside the layers. With ``recomputed`` the second forward pass of the layers is counted too. The other
    arguments are as in ``forward_flops_per_token``.
    """
    forward, backward = (
        forward_flops_per_token(
            config,
            sequence_length,
            attention_share,
            rbf_share,
            count_masked=count_masked,
            backward=backward,
            training=True,
        )
        for backward in (False, True)
    )
    heads = 0.0 if predicts_tokens else forward.head + backward.head
    return forward.total + backward.total - heads + recomputed * (forward.total - forward.head)
