"""What the ranks of a tensor group send one another: payload in values of the compute type, for one token.

The payload of a gather or a scatter is the whole tensor, of an all-reduce twice that (it is a scatter and a gather); of
it each of p ranks sends (p - 1) / p. Rows are d values wide, f is the share of tokens that take attention.

    with sequence parallelism          forward              backward (inputs of products are gathered once more)
    attention in every row             2 d                  3 d
    routed                             (1 + f) d + 1 byte   (2 + f) d
    routed, keys of routed tokens      2 f d + 1 byte       3 f d
    DCT mixing                         0                    0
    feed-forward                       2 d                  3 d

    without                            forward              backward
    attention in every row             2 d                  2 d
    routed                             2 f d + 1 byte       2 d
    routed, keys of routed tokens      2 f d + 1 byte       2 f d
    DCT mixing                         0                    0
    feed-forward                       2 d                  2 d

Where keys and values come from all tokens, a routed layer gathers them all; its queries and results cost what is
routed.
"""

from __future__ import annotations

from dataclasses import dataclass

from megachiar.config.model import ModelConfig


@dataclass(frozen=True)
class Traffic:
    """Payload of one token: values in the forward and in the backward pass, and bytes of routes."""

    forward: float
    backward: float
    route_bytes: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.forward + other.forward, self.backward + other.backward, self.route_bytes + other.route_bytes
        )

    def bytes(self, width: int) -> float:
        """Of both passes, values of ``width`` bytes."""
        return (self.forward + self.backward) * width + self.route_bytes


def layer_traffic(config: ModelConfig, index: int, attention_share: float, sequence: bool) -> Traffic:
    """Of layer ``index`` (from 0), both sub-layers; ``attention_share`` is that of the routed layers' tokens."""
    d = config.hidden_size
    feed_forward = Traffic(2 * d, (3 if sequence else 2) * d)
    if config.kind == "chiar" and index == 0:
        return feed_forward
    if index not in config.routed_layers or config.router.kind == "soft":
        return feed_forward + Traffic(2 * d, (3 if sequence else 2) * d) + _rbf(config, index, 1.0, sequence)
    f = attention_share
    if config.attention.keys == "routed":
        operator = Traffic(2 * f * d, (3 if sequence else 2) * f * d, 1)
    else:
        operator = Traffic((1 + f) * d, (2 + f) * d, 1) if sequence else Traffic(2 * f * d, 2 * d, 1)
    return feed_forward + operator + _rbf(config, index, f, sequence)


def _rbf(config: ModelConfig, index: int, attention_share: float, sequence: bool) -> Traffic:
    """The features of RBF mixing, which sharded rows gather."""
    if not sequence or index not in config.routed_layers or "rbf" not in config.router.operators:
        return Traffic(0, 0)
    return Traffic(2 * config.rbf.features, 2 * config.rbf.features)


def end_traffic(config: ModelConfig, sequence: bool) -> tuple[Traffic, Traffic]:
    """Of the embedding and of the head. The loss sends 8 bytes a token and rank more."""
    d = config.hidden_size
    if sequence:
        return Traffic(d, d), Traffic(d, d)
    return Traffic(2 * d, 0), Traffic(0, 2 * d)
