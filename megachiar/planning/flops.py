"""How much a model computes.

Protocol: a multiply-add is 2 FLOPs. Matrix products, attention products and the transforms count; norms, activations,
softmax, rotations and the router's comparisons do not. A DCT or its inverse counts 2.5 d log2 d, the FFT's number,
whatever computes it.

                    forward                                          backward
    products        one                                              two: of what is multiplied and of the weight
    attention       two (scores, and values by them)                 four
    DCT mixing      an inverse, and a transform where the router     a transform of the gradient and an inverse
                    has not made it of the same rows
    router          a transform of every row, and one more where     one, where H has a gradient
                    H has a gradient
    RBF features    one                                              one: their frequencies are not trained

These are the model's FLOPs, by which runs are compared. What a kernel computes again in the backward pass (the scores)
is not counted; layers that are recomputed are, where it is asked for.

Causal attention counts the (T + 1) / 2 keys that a query sees on average, T being those that give keys. With
``count_masked`` it counts all T, as papers often do and as a counter does that watches a kernel without causal
skipping; savings by routing look larger by it at long sequences.

In the FLOPs, ``attention_share`` is the share of all layers' tokens that take attention, as a run logs it on average:
the first (DCT) and last (attention) layer are part of it. A soft router computes every operator for every token.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace

from megachiar.config.model import ModelConfig


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token, by part.

    Attributes:
        attention: projections and products; of them ``products`` are those of queries with keys and values.
        products: see there.
        spectral: transforms, for routing and for mixing.
        rbf: features, products and projection of RBF mixing.
        gates: of soft and hard routers and of the MetaRouter.
        feed_forward: of all layers.
        head: the logits.
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
        """Of the operator sub-layers alone, routing included: what routing can save."""
        return self.attention + self.spectral + self.rbf + self.gates

    @property
    def total(self) -> float:
        return self.operators + self.feed_forward + self.head


def forward_flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    attention_share: float,
    rbf_share: float = 0.0,
    *,
    count_masked: bool = False,
    backward: bool = False,
) -> TokenFlops:
    """FLOPs of one token's forward pass, mean over a sequence of ``sequence_length`` tokens.

    Args:
        config: of the model.
        sequence_length: T.
        attention_share, rbf_share: of all layers' tokens, those that take the operator.
        count_masked: count keys that a query does not see.
        backward: of the backward pass instead.
    """
    routed = len(config.routed_layers)
    shares = (attention_share * config.num_layers - 1, rbf_share * config.num_layers)
    shares = tuple(share / routed for share in shares) if routed else (1.0, 0.0)
    options = {"count_masked": count_masked, "backward": backward}
    parts = [
        layer_flops_per_token(config, index, sequence_length, *shares, **options) for index in range(config.num_layers)
    ]
    stack = TokenFlops(*(sum(values) for values in zip(*map(astuple, parts), strict=True)))
    return replace(stack, head=(4 if backward else 2) * config.hidden_size * config.vocab_size)


def layer_flops_per_token(
    config: ModelConfig,
    index: int,
    sequence_length: int,
    attention_share: float,
    rbf_share: float = 0.0,
    *,
    count_masked: bool = False,
    backward: bool = False,
) -> TokenFlops:
    """FLOPs of one token's pass through layer ``index``; the shares are those of a routed layer's tokens."""
    d, router = config.hidden_size, config.router
    routed, spectral_only = index in config.routed_layers, config.kind == "chiar" and index == 0
    three = routed and len(router.operators) == 3
    attends, mixes, by_rbf = 1.0, 0.0, 0.0
    if spectral_only:
        attends, mixes = 0.0, 1.0
    elif routed and router.kind == "soft":
        mixes, by_rbf = 1.0, float(three)
    elif routed:
        by_rbf = rbf_share if three else 0.0
        attends, mixes = attention_share, 1 - attention_share - by_rbf
    passes = 2 if backward else 1

    with_keys = attends if routed and config.attention.keys == "routed" else float(not spectral_only)
    products = passes * attends * 4 * d * _seen(with_keys * sequence_length, count_masked)
    projections = passes * (attends + with_keys) * 4 * d * d

    has_slope = routed and (router.kind in ("soft", "hard") or router.collapse_weight > 0)
    unknown = spectral_only or config.norm == "pre"  # the router has not transformed these rows
    transforms = 2 * mixes + has_slope if backward else routed + has_slope + (1 + unknown) * mixes

    features = config.rbf.features
    rbf = passes * by_rbf * (8 * features * _seen(sequence_length, count_masked) + 4 * features * d)
    rbf += three * 2 * d * features

    gates = routed * (router.kind in ("soft", "hard")) * 2 * (d + 1) * len(router.operators)
    gates += spectral_only * (config.meta_router.pool == "causal") * 2 * d
    return TokenFlops(
        attention=projections + products,
        products=products,
        spectral=transforms * transform_flops(d),
        rbf=rbf,
        gates=passes * gates,
        feed_forward=passes * 4 * d * config.ffn_size,
        head=0.0,
    )


def transform_flops(d: int) -> float:
    """FLOPs of a DCT of ``d`` channels, or of its inverse."""
    return 2.5 * d * math.log2(d)


def _seen(keys: float, count_masked: bool) -> float:
    """Keys of a sequence that a query sees on average."""
    return keys if count_masked else (keys + 1) / 2


def training_flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    attention_share: float,
    rbf_share: float = 0.0,
    *,
    count_masked: bool = False,
    recomputed: bool = False,
) -> float:
    """FLOPs of one token's forward and backward pass; with ``recomputed``, of the layers' second forward pass too."""
    forward, backward = (
        forward_flops_per_token(
            config, sequence_length, attention_share, rbf_share, count_masked=count_masked, backward=b
        )
        for b in (False, True)
    )
    return forward.total + backward.total + recomputed * (forward.total - forward.head)
