"""Memory of one rank, from the config alone.

The tensors of a run are counted, on a GPU unless another device is asked for. Libraries, CUDA contexts and the
allocator's gaps come on top. For each parameter of a rank DeepSpeed holds the bytes of the table. There p is the width
of the compute dtype, g that of the accumulation dtype, and D the number of data-parallel ranks. AdamW has two moments.
Muon has one, so that the last column is less by 4, or by 4/D under ZeRO, for the parameters that it trains:

    ZeRO                        weights   gradients                   master weights and moments
    0 (fp32)                    4         4                           8
    1                           p         larger of p + g/D, 8/D      12/D
    1, bf16 summed in fp32      2         4 + 2                       12/D
    2                           p         8/D, or g/D for 16 bits     12/D
    3                           p/D       8/D                         12/D

ZeRO 2 and 3 also hold a bucket of a fixed size, which gradients pass through when they are reduced. Captured layers
hold the gradients of one graph's weights in the graph and in memory that all graphs share. Under ZeRO 2 they then have
them all at once, instead of one after another.
"""

from __future__ import annotations

from dataclasses import dataclass

from megachiar.config import RunConfig
from megachiar.config.deepspeed import to_deepspeed
from megachiar.kernels.cross_entropy import buffer_bytes
from megachiar.model.dtypes import DTYPES
from megachiar.model.static_shapes import plans_static_shapes
from megachiar.planning.activations import TokenActivations, head_activations, layer_activations
from megachiar.planning.muon import NO_COSTS, MuonCosts
from megachiar.planning.partition import Stage, layer_groups


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank.

    Attributes:
        parameters: weights that the model computes with.
        gradients: gradients, at their peak.
        optimizer: master weights and the optimizer's moments, as far as they are on the device.
        buffers: DeepSpeed's buckets, the gradients within captured graphs, and the working memory of the loss.
        activations_kept: activations of the micro-batches in flight, if all activations are kept.
        activations_recomputed: the same, if of each group of layers that the config recomputes together only the input
            is kept. If it recomputes none, each layer is a group.
        stepping: working memory of the optimizer's step, which holds no activations.
        recomputes: whether the config recomputes activations.
    """

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations_kept: float
    activations_recomputed: float
    stepping: float
    recomputes: bool

    @property
    def state(self) -> float:
        """Return the bytes that do not depend on the batch."""
        return self.parameters + self.gradients + self.optimizer + self.buffers

    @property
    def total(self) -> float:
        """Return all bytes: with the activations that the config keeps, or in the optimizer's step if it has more."""
        activations = self.activations_recomputed if self.recomputes else self.activations_kept
        return self.state + max(activations, self.stepping)


def rank_memory(
    config: RunConfig,
    data_size: int,
    stage: Stage,
    parameters: int,
    device: str,
    muon: MuonCosts = NO_COSTS,
    captured: int = 0,
) -> RankMemory:
    """Return the memory of one rank of ``stage``.

    Args:
        config: config of the run.
        data_size: number of data-parallel replicas.
        stage: the rank's pipeline stage.
        parameters: number of parameters of the rank.
        device: type of the device, ``"cuda"`` or ``"cpu"``.
        muon: what Muon costs the rank.
        captured: the most parameters whose layers are captured together.
    """
    width = DTYPES[config.precision.compute].itemsize
    return RankMemory(
        parameters=parameters * width / (data_size if config.parallel.zero_stage == 3 else 1),
        gradients=parameters * _gradient_bytes(config, data_size),
        optimizer=_optimizer_bytes(config, data_size, parameters, muon.parameters),
        buffers=_bucket_bytes(config)
        + captured * width * (3 if config.parallel.zero_stage == 2 else 2)
        + (_loss_bytes(config, device) if stage.is_last else 0),
        activations_kept=_activation_bytes(config, stage, device, recompute=False),
        activations_recomputed=_activation_bytes(config, stage, device, recompute=True),
        stepping=muon.working,
        recomputes=config.training.activation_checkpoint_interval is not None,
    )


def _gradient_bytes(config: RunConfig, data_size: int) -> float:
    """Return the peak bytes of gradients for each parameter: the third column of the table above."""
    zero_stage, compute = config.parallel.zero_stage, config.precision.compute
    width = DTYPES[compute].itemsize
    accumulation_width = DTYPES[config.precision.gradient_accumulation].itemsize
    if zero_stage == 0:
        return 4.0
    if config.parallel.offload_optimizer and zero_stage != 1:
        return width / data_size
    # AdamW steps fp32 gradients: they are a copy, unless a 16-bit dtype is accumulated in fp32 already.
    copy_width = 4 if compute == "fp32" or accumulation_width < 4 else 0
    stepped = (accumulation_width + copy_width) / data_size
    if zero_stage == 1 and compute == "bf16" and accumulation_width == 4 and not config.parallel.offload_optimizer:
        return 6.0
    if zero_stage == 1:
        return max(width + accumulation_width / data_size, stepped)
    return 8 / data_size if zero_stage == 3 else stepped


def _optimizer_bytes(config: RunConfig, data_size: int, parameters: int, of_muon: int) -> float:
    """Return the bytes of master weights and moments on the device: the last column of the table for all parameters."""
    if config.parallel.offload_optimizer:
        return 0.0
    moments = 2 * parameters - of_muon
    return 4 * moments if config.parallel.zero_stage == 0 else 4 * (parameters + moments) / data_size


def _activation_bytes(config: RunConfig, stage: Stage, device: str, recompute: bool) -> float:
    """Return the peak bytes of activations whose backward pass is still to come on this stage."""
    model, parallel, training = config.model, config.parallel, config.training
    tokens = training.micro_batch_size * config.sequence_length

    def bytes_of(values: TokenActivations) -> float:
        per_token = values.per_rank(parallel.tensor_size, parallel.sequence)
        return tokens * per_token * DTYPES[config.precision.compute].itemsize

    share, static = model.expected_attention_share, plans_static_shapes(config, device)
    layers = [bytes_of(layer_activations(model, index, share, static)) for index in stage.layers]
    head = bytes_of(head_activations(model)) if stage.is_last else 0.0
    in_flight = stage.count - stage.number  # 1F1B: each later stage holds one more forward pass than backward passes
    if not recompute:
        return in_flight * sum(layers) + head
    groups = [
        sum(layers[index - stage.layers.start] for index in group)
        for group in layer_groups(model, training.activation_checkpoint_interval)
        if group.start in stage.layers
    ]
    inputs = bytes_of(TokenActivations(model.hidden_size, 0)) * len(groups)
    return in_flight * inputs + max(groups) + head


def _bucket_bytes(config: RunConfig) -> int:
    """Return the bytes of the bucket for the reduction of gradients."""
    if config.parallel.zero_stage < 2:
        return 0
    values = to_deepspeed(config)["zero_optimization"]["reduce_bucket_size"]
    return values * DTYPES[config.precision.compute].itemsize


def _loss_bytes(config: RunConfig, device: str) -> int:
    """Return the bytes of the working memory of the head's loss."""
    return buffer_bytes(
        rows=config.training.micro_batch_size * config.sequence_length,
        channels=config.model.hidden_size,
        vocabulary=config.model.vocab_size // config.parallel.tensor_size,
        dtype=DTYPES[config.precision.compute],
        device=device,
        by_triton=device == "cuda" and config.precision.kernels != "torch",
    )
