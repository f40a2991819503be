"""The communication between ranks, from the config alone.

First comes the payload of the collectives in a tensor-parallel group, in values of the compute dtype for one token. The
payload of an all-gather or a reduce-scatter is the whole tensor. That of an all-reduce is twice the tensor, because it
is a reduce-scatter and an all-gather. Each of p ranks sends (p - 1) / p of the payload. The hidden states of a token
are d values, and f is the share of tokens that take attention.

    with sequence parallelism          forward              backward (inputs of products are gathered once more)
    attention for every token          2 d                  3 d
    routed                             (1 + f) d + 1 byte   (2 + f) d
    routed, keys of routed tokens      2 f d + 1 byte       3 f d
    DCT mixing                         0                    0
    feed-forward                       2 d                  3 d

    without                            forward              backward
    attention for every token          2 d                  2 d
    routed                             2 f d + 1 byte       2 d
    routed, keys of routed tokens      2 f d + 1 byte       2 f d
    DCT mixing                         0                    0
    feed-forward                       2 d                  2 d

Where keys and values come from all tokens, a routed layer gathers the rows of all tokens. The cost of its queries and
results follows the share of routed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from megachiar.config import RunConfig
from megachiar.config.model import ModelConfig
from megachiar.model.dtypes import DTYPES
from megachiar.planning.partition import Stage
from megachiar.planning.step_tokens import micro_batches_of_replica, step_tokens


@dataclass(frozen=True)
class TokenPayload:
    """Payload of one token in the collectives of a tensor-parallel group.

    Attributes:
        forward: values in the forward pass.
        backward: values in the backward pass.
        route_bytes: bytes of routes, sent in the forward pass.
    """

    forward: float
    backward: float
    route_bytes: float = 0.0

    def __add__(self, other: TokenPayload) -> TokenPayload:
        return TokenPayload(
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            route_bytes=self.route_bytes + other.route_bytes,
        )

    def bytes(self, width: int) -> float:
        """Return the bytes of both passes, where a value has ``width`` bytes."""
        return (self.forward + self.backward) * width + self.route_bytes


def layer_payload(config: ModelConfig, index: int, attention_share: float, sequence: bool) -> TokenPayload:
    """Return the payload of layer ``index`` (from 0): of its operator and its feed-forward sub-layer.

    ``attention_share`` is the share of a routed layer's tokens that take attention; ``sequence`` says whether the group
    uses sequence parallelism.
    """
    d = config.hidden_size
    dense = TokenPayload(2 * d, (3 if sequence else 2) * d)
    if config.kind == "chiar" and index == 0:
        return dense
    if index not in config.routed_layers or config.router.kind == "soft":
        return dense + dense + _rbf_payload(config, index, sequence)
    f = attention_share
    if config.router.kind == "learned":  # explored tokens take attention, too
        f += config.router.explore * (1 - f)
    if config.attention.keys == "routed":
        operator = TokenPayload(2 * f * d, (3 if sequence else 2) * f * d, 1)
    else:
        operator = TokenPayload((1 + f) * d, (2 + f) * d, 1) if sequence else TokenPayload(2 * f * d, 2 * d, 1)
    return dense + operator + _rbf_payload(config, index, sequence)


def _rbf_payload(config: ModelConfig, index: int, sequence: bool) -> TokenPayload:
    """Return the payload of RBF mixing's features, which ranks gather where rows are sharded."""
    if not sequence or index not in config.routed_layers or "rbf" not in config.router.operators:
        return TokenPayload(0, 0)
    return TokenPayload(2 * config.rbf.features, 2 * config.rbf.features)


def end_payloads(config: ModelConfig, sequence: bool) -> tuple[TokenPayload, TokenPayload]:
    """Return the payloads of the embedding and of the head, without 8 bytes per token and rank that the loss sends."""
    d = config.hidden_size
    if sequence:
        return TokenPayload(d, d), TokenPayload(d, d)
    return TokenPayload(2 * d, 0), TokenPayload(0, 2 * d)


@dataclass(frozen=True)
class RankCommunication:
    """Bytes that one rank sends in a step.

    Attributes:
        tensor: bytes to the other ranks of its tensor-parallel group.
        pipeline: bytes to the neighbouring stages.
        data: bytes to the other data-parallel replicas.
    """

    tensor: float
    pipeline: float
    data: float


def rank_communication(config: RunConfig, data_size: int, stage: Stage, parameters: int) -> RankCommunication:
    """Return the bytes that one rank of ``stage`` sends in a step.

    Args:
        config: config of the run.
        data_size: number of data-parallel replicas.
        stage: the rank's pipeline stage.
        parameters: number of parameters of the rank.
    """
    return RankCommunication(
        tensor=_tensor_bytes(config, data_size, stage),
        pipeline=_pipeline_bytes(config, data_size, stage),
        data=_data_bytes(config, data_size, parameters),
    )


def _tensor_bytes(config: RunConfig, data_size: int, stage: Stage) -> float:
    """Return the bytes that the collectives of the tensor-parallel group send, those of recomputed layers included."""
    model, parallel = config.model, config.parallel
    width = DTYPES[config.precision.compute].itemsize
    layers = [layer_payload(model, index, model.expected_attention_share, parallel.sequence) for index in stage.layers]
    embedding, head = end_payloads(model, parallel.sequence)
    payloads = layers + [embedding] * stage.is_first
    recomputed = 0.0
    if config.training.activation_checkpoint_interval is not None:
        recomputed = sum(layer.forward for layer in layers) * width
    per_token = sum(payload.bytes(width) for payload in payloads) + recomputed
    tokens = step_tokens(config)
    sent = per_token * tokens.total + head.bytes(width) * tokens.predicting * stage.is_last
    return sent / data_size * (parallel.tensor_size - 1) / parallel.tensor_size


def _pipeline_bytes(config: RunConfig, data_size: int, stage: Stage) -> float:
    """Return the bytes of hidden states to the next stage and of their gradients to the one before."""
    parallel = config.parallel
    neighbours = (not stage.is_first) + (not stage.is_last)
    width = DTYPES[config.precision.compute].itemsize
    values = neighbours * step_tokens(config).total / data_size * config.model.hidden_size
    return values * width / (parallel.tensor_size if parallel.sequence else 1)


def _data_bytes(config: RunConfig, data_size: int, parameters: int) -> float:
    """Return the bytes of gradients that are reduced and of weights that are gathered.

    ZeRO 1 reduces gradients once per step and ZeRO 2 and 3 once per micro-batch. ZeRO 1 and 2 gather new weights once
    per step, ZeRO 3 gathers weights twice per micro-batch. The all-reduce of ZeRO 0 counts as both.
    """
    zero_stage = config.parallel.zero_stage
    width = DTYPES[config.precision.compute].itemsize
    micro_batches = micro_batches_of_replica(config, data_size)
    gradient_width = DTYPES[config.precision.gradient_accumulation].itemsize if zero_stage == 1 else width
    if zero_stage == 3:
        payload = parameters * width * 3 * micro_batches
    elif zero_stage == 2:
        payload = parameters * (width * micro_batches + width)
    else:
        payload = parameters * (gradient_width + width)
    return payload * (data_size - 1) / data_size
