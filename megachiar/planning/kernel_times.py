"""Estimate how long a rank works on a micro-batch, from the sizes of its layers and the rates of the GPU.

    matrix product      FLOPs / rate of large products, and its operands and result once through memory
    attention           FLOPs of the keys that are seen / rate of a fused kernel. The backward pass computes the scores
                        again.
    DCT                 the product with the matrix of the transform, as a GPU computes it: in fp32, or two 16-bit
                        ones for a router without a gradient
    all else            bytes of norms, activations, rotations, sums and the loss / bandwidth of memory

Kernels run one after another, and their launch takes no time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megachiar.config import RunConfig
from megachiar.model.dtypes import DTYPES
from megachiar.planning.flops import TokenFlops, layer_flops_per_token, transform_flops
from megachiar.planning.gpus import Gpu
from megachiar.planning.step_tokens import step_tokens

SUM_AND_NORM = 5
"""How often a sub-layer moves a token's d values in its forward pass, besides its operator: two rows are summed into
one, and that is normed into another."""
ROTATION = 4
"""How often rotary positions do, of queries and keys."""
ACTIVATION = 2
"""How often the activation of the feed-forward moves a token's f values."""
TRANSFORM = 4
"""How often a transform and what is done with the spectrum move d values, in fp32."""
PERMUTATIONS = 4
"""How often a routed layer moves d values to sort tokens by operator and back."""
BACKWARD = 2
"""How often the backward pass moves values, against the forward pass."""
LOGIT = 4
"""How often a logit is moved: the product writes it, the loss reads it and writes its gradient, which is read."""
SCORE_FORWARD, SCORE_BACKWARD = 4.5, 5.5
"""How often softmax and dropout move a score that a kernel does not keep to itself; a mask of dropout is one byte."""


@dataclass(frozen=True)
class WorkTime:
    """Seconds of a rank's work by kind.

    Attributes:
        products: matrix products of projections, feed-forward and head.
        attention: scores, and their products with values.
        transforms: DCTs.
        memory: all that moves bytes and computes little.
    """

    products: float
    attention: float
    transforms: float
    memory: float

    @property
    def total(self) -> float:
        """Return the seconds of all kinds."""
        return self.products + self.attention + self.transforms + self.memory

    def scaled(self, factor: float) -> WorkTime:
        """Return the times of so many of these."""
        return WorkTime(
            products=self.products * factor,
            attention=self.attention * factor,
            transforms=self.transforms * factor,
            memory=self.memory * factor,
        )


def sum_of_works(works: Iterable[WorkTime]) -> WorkTime:
    """Return the times of ``works`` together."""
    works = list(works)
    return WorkTime(
        products=sum(work.products for work in works),
        attention=sum(work.attention for work in works),
        transforms=sum(work.transforms for work in works),
        memory=sum(work.memory for work in works),
    )


def layer_work(config: RunConfig, gpu: Gpu, index: int, fused_attention: bool) -> WorkTime:
    """Return the time of layer ``index`` (from 0) for a micro-batch: forward and backward, and forward once more if the
    config recomputes it.

    Without ``fused_attention`` scores are written to memory and computed again in the backward pass, those of unseen
    keys too, as it was done before FlashAttention.
    """
    model, size, share = config.model, config.parallel.tensor_size, config.model.expected_attention_share
    tokens = config.training.micro_batch_size * config.sequence_length
    forward, backward = (
        layer_flops_per_token(model, index, config.sequence_length, share, backward=b, training=True)
        for b in (False, True)
    )
    forward_passes = 1 if config.training.activation_checkpoint_interval is None else 2

    def flops(part: str) -> float:
        """Return a rank's FLOPs of ``part`` of ``TokenFlops`` in all passes."""
        return (forward_passes * getattr(forward, part) + getattr(backward, part)) * tokens / size

    d = model.hidden_size
    rows = tokens * (share if index in model.routed_layers else 1.0)
    products = [
        product_seconds(config, gpu, flops("attention") - flops("products"), rows, d, d / size),
        product_seconds(config, gpu, flops("feed_forward"), tokens, d, model.ffn_size / size),
        product_seconds(config, gpu, flops("rbf") + flops("gates"), tokens, d, d / size),
    ]
    moved = _moved_bytes(config, index) * tokens * (forward_passes + BACKWARD) / gpu.memory_bandwidth
    if fused_attention:
        attention = (flops("products") + forward.products / 2 * tokens / size) / gpu.attention
    else:
        attention = _unfused_attention_seconds(config, gpu, forward, backward)
    return WorkTime(
        products=sum(products),
        attention=attention,
        transforms=_transform_seconds(config, gpu, index, forward, backward),
        memory=moved,
    )


def head_work(config: RunConfig, gpu: Gpu) -> WorkTime:
    """Return the time of the language model's head and its loss for a micro-batch."""
    tokens, model = step_tokens(config), config.model
    rows = config.training.micro_batch_size * config.sequence_length * tokens.predicting / tokens.total
    columns = model.vocab_size / config.parallel.tensor_size
    flops = 6 * rows * model.hidden_size * columns
    return WorkTime(
        products=product_seconds(config, gpu, flops, rows, model.hidden_size, columns),
        attention=0.0,
        transforms=0.0,
        memory=LOGIT * rows * columns * _width(config) / gpu.memory_bandwidth,
    )


def product_seconds(config: RunConfig, gpu: Gpu, flops: float, rows: float, inner: float, columns: float) -> float:
    """Return the time of products of (rows, inner) with (inner, columns) that take ``flops`` in all."""
    if not flops:
        return 0.0
    rate = gpu.products
    if config.precision.compute == "fp32":
        rate = gpu.tf32 if config.precision.tf32 else gpu.fp32
    values = flops / 2 * (1 / rows + 1 / inner + 1 / columns)
    return flops / rate + values * _width(config) / gpu.memory_bandwidth


def _width(config: RunConfig) -> int:
    """Return the bytes of a value in a step."""
    return DTYPES[config.precision.compute].itemsize


def _moved_bytes(config: RunConfig, index: int) -> float:
    """Return the bytes that a layer's forward pass moves for a token on one rank, besides products and transforms."""
    model, parallel = config.model, config.parallel
    d, share = model.hidden_size, model.expected_attention_share
    is_routed = index in model.routed_layers
    attends = 0.0 if model.kind == "chiar" and index == 0 else share if is_routed else 1.0
    rows = (2 * SUM_AND_NORM + is_routed * PERMUTATIONS) * d / (parallel.tensor_size if parallel.sequence else 1)
    shared = (ACTIVATION * model.ffn_size + attends * ROTATION * d) / parallel.tensor_size
    return (rows + shared) * _width(config)


def _transform_seconds(config: RunConfig, gpu: Gpu, index: int, forward: TokenFlops, backward: TokenFlops) -> float:
    """Return the time of a layer's DCTs, which only sequence parallelism shares out."""
    model, parallel = config.model, config.parallel
    d = model.hidden_size
    of_router = (2 if model.router.kind == "hashed" else 1) if index in model.routed_layers else 0
    passes = 1 if config.training.activation_checkpoint_interval is None else 2
    count = (passes * forward.spectral + backward.spectral) / transform_flops(d)
    by_halves = of_router if config.precision.compute != "fp32" else 0
    shards = parallel.tensor_size if parallel.sequence else 1
    tokens = config.training.micro_batch_size * config.sequence_length / shards
    exact = (count - by_halves) * 2 * d * d / gpu.fp32 + by_halves * 4 * d * d / gpu.products
    return tokens * (exact + count * TRANSFORM * d * 4 / gpu.memory_bandwidth)


def _unfused_attention_seconds(config: RunConfig, gpu: Gpu, forward: TokenFlops, backward: TokenFlops) -> float:
    """Return the time of attention whose scores lie in memory, for the (T, T) scores of each sequence and head."""
    model, length, size = config.model, config.sequence_length, config.parallel.tensor_size
    tokens = config.training.micro_batch_size * length
    seen = (length + 1) / 2 / length
    flops = (2 * forward.products + backward.products) / seen * tokens / size
    heads = model.num_attention_heads
    scores = tokens * length * heads / size
    moved = (2 * SCORE_FORWARD + SCORE_BACKWARD) * scores * _width(config) / gpu.memory_bandwidth
    return product_seconds(config, gpu, flops, length, model.hidden_size / heads, length) + moved
