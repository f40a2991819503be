"""What a layout costs each rank, in memory and in what it sends, from the config alone.

Memory counts the tensors of a run, on GPUs unless another device is asked for; libraries, CUDA contexts and the
allocator's gaps come on top. For one parameter of a rank (p: bytes of the compute type, g: bytes of the accumulation
type, D: data-parallel ranks) DeepSpeed holds

    ZeRO                        weights   gradients                   master weights and moments
    0 (fp32)                    4         4                           8
    1                           p         larger of p + g/D, 8/D      12/D
    1, bf16 summed in fp32      2         4 + 2                       12/D
    2                           p         8/D, or g/D for 16 bits     12/D
    3                           p/D       8/D                         12/D

and buckets of a fixed size, through which gradients (ZeRO 2 and 3) are reduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from megachiar.config import RunConfig
from megachiar.config.deepspeed import to_deepspeed
from megachiar.kernels.cross_entropy import buffer_bytes
from megachiar.model.dtypes import DTYPES
from megachiar.model.embedding import TiedEmbedding
from megachiar.model.layer_stack import build_layer
from megachiar.model.norm import RowNorm
from megachiar.planning.activations import KeptValues, end_activations, layer_activations
from megachiar.planning.communication import end_traffic, layer_traffic
from megachiar.planning.flops import forward_flops_per_token, layer_flops_per_token
from megachiar.planning.partition import layer_groups, stage_layers
from megachiar.topology import SINGLE_RANK, TensorParallelGroup

WIDTH = {name: dtype.itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        parameters: weights that compute.
        gradients: at their most.
        optimizer: master weights and AdamW's moments on the device.
        buffers: DeepSpeed's buckets, and those of the loss.
        activations_kept: of the micro-batches that are under way, if all are kept.
        activations_recomputed: if the inputs of single layers, or of the config's groups, are kept.
        recomputes: which of the two the config chooses.
    """

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations_kept: float
    activations_recomputed: float
    recomputes: bool

    @property
    def state(self) -> float:
        """What does not depend on the batch."""
        return self.parameters + self.gradients + self.optimizer + self.buffers

    @property
    def total(self) -> float:
        return self.state + (self.activations_recomputed if self.recomputes else self.activations_kept)


@dataclass(frozen=True)
class StepTraffic:
    """Bytes that one rank sends in a step: within its tensor group, to other stages, to other replicas."""

    tensor: float
    pipeline: float
    data: float


@dataclass(frozen=True)
class RankPlan:
    """One rank of a stage.

    Attributes:
        layers: of the stage, from 0.
        parameters: of the rank.
        flops: of its forward passes in a step, those of recomputed layers twice, and of its backward passes.
    """

    layers: range
    parameters: int
    flops: float
    memory: Memory
    traffic: StepTraffic


def plan_ranks(config: RunConfig, data_size: int, device: str = "cuda") -> list[RankPlan]:
    """A rank of each stage, on a ``device`` of this type; ranks of one stage are alike."""
    model, parallel = config.model, config.parallel
    interval = config.training.activation_checkpoint_interval
    share = model.expected_attention_share
    stages = stage_layers(model, interval, config.sequence_length, share, parallel.pipeline_size)
    counts = _layer_parameters(config)
    return [_plan_stage(config, data_size, stages, number, counts, device) for number in range(len(stages))]


def _plan_stage(
    config: RunConfig, data_size: int, stages: list[range], number: int, counts: list[int], device: str
) -> RankPlan:
    model, parallel, layers = config.model, config.parallel, stages[number]
    first, last = number == 0, number == len(stages) - 1
    head = _embedding_parameters(config)
    parameters = sum(counts[i] for i in layers) + head * (first or last) + _norm_parameters(config) * last
    share, length = model.expected_attention_share, config.sequence_length
    tokens = config.training.global_batch_size // data_size * length
    recomputes = config.training.activation_checkpoint_interval is not None
    forward, backward = (
        sum(layer_flops_per_token(model, i, length, share, backward=b).total for i in layers) for b in (False, True)
    )
    flops = (2 if recomputes else 1) * forward + backward
    flops += last * sum(forward_flops_per_token(model, length, share, backward=b).head for b in (False, True))
    return RankPlan(
        layers=layers,
        parameters=parameters,
        flops=flops * tokens / parallel.tensor_size,
        memory=_memory(config, data_size, stages, number, parameters, device),
        traffic=_traffic(config, data_size, stages, number, parameters),
    )


def _memory(
    config: RunConfig, data_size: int, stages: list[range], number: int, parameters: int, device: str
) -> Memory:
    zero, compute = config.parallel.zero_stage, config.precision.compute
    width, summed = WIDTH[compute], WIDTH[config.precision.gradient_accumulation]
    if zero == 0:
        gradients, optimizer = 4.0, 8.0
    else:
        optimizer = 12 / data_size
        # AdamW steps fp32 gradients: a copy, unless a 16-bit type is summed in fp32 already.
        stepped = (summed + (4 if compute == "fp32" or summed < 4 else 0)) / data_size
        if zero == 1 and compute == "bf16" and summed == 4 and not config.parallel.offload_optimizer:
            gradients = 6.0
        elif zero == 1:
            gradients = max(width + summed / data_size, stepped)
        else:
            gradients = 8 / data_size if zero == 3 else stepped
    if config.parallel.offload_optimizer:
        optimizer, gradients = 0.0, gradients if zero == 1 else width / data_size
    kept, recomputed = (_activations(config, stages, number, every) for every in (False, True))
    return Memory(
        parameters=parameters * width / (data_size if zero == 3 else 1),
        gradients=parameters * gradients,
        optimizer=parameters * optimizer,
        buffers=_buckets(config) + (_loss_buffers(config, device) if number == len(stages) - 1 else 0),
        activations_kept=kept,
        activations_recomputed=recomputed,
        recomputes=config.training.activation_checkpoint_interval is not None,
    )


def _activations(config: RunConfig, stages: list[range], number: int, recompute: bool) -> float:
    """Bytes of the micro-batches whose backward pass is still to come on this stage, at their most."""
    model, parallel, training = config.model, config.parallel, config.training
    share, tp, layers = model.expected_attention_share, parallel.tensor_size, stages[number]
    tokens = training.micro_batch_size * config.sequence_length

    def bytes_of(values: KeptValues) -> float:
        return tokens * values.on_a_rank(tp, parallel.sequence) * WIDTH[config.precision.compute]

    each = [bytes_of(layer_activations(model, index, share)) for index in layers]
    ends = bytes_of(end_activations(model)) if number == len(stages) - 1 else 0.0
    under_way = len(stages) - number  # 1F1B: each later stage holds one more forward pass than backward passes
    if not recompute:
        return under_way * sum(each) + ends
    every = layer_groups(model, training.activation_checkpoint_interval)
    groups = [sum(each[i - layers.start] for i in group) for group in every if group.start in layers]
    inputs = bytes_of(KeptValues(model.hidden_size, 0)) * len(groups)
    return under_way * inputs + max(groups) + ends


def _buckets(config: RunConfig) -> float:
    """Bytes that gradients are reduced through."""
    if config.parallel.zero_stage < 2:
        return 0
    return to_deepspeed(config)["zero_optimization"]["reduce_bucket_size"] * WIDTH[config.precision.compute]


def _loss_buffers(config: RunConfig, device: str) -> int:
    """Bytes that the head's loss takes for itself."""
    return buffer_bytes(
        rows=config.training.micro_batch_size * config.sequence_length,
        channels=config.model.hidden_size,
        vocabulary=config.model.vocab_size // config.parallel.tensor_size,
        dtype=DTYPES[config.precision.compute],
        device=device,
        by_triton=device == "cuda" and config.precision.kernels != "torch",
    )


def _traffic(config: RunConfig, data_size: int, stages: list[range], number: int, parameters: int) -> StepTraffic:
    model, parallel, training = config.model, config.parallel, config.training
    share, tp, sequence, layers = (
        model.expected_attention_share,
        parallel.tensor_size,
        parallel.sequence,
        stages[number],
    )
    width = WIDTH[config.precision.compute]
    tokens = training.global_batch_size // data_size * config.sequence_length
    parts = [layer_traffic(model, index, share, sequence) for index in layers]
    embedding, head = end_traffic(model, sequence)
    first, last = number == 0, number == len(stages) - 1
    parts += [embedding] * first + [head] * last
    again = sum(part.forward for part in parts[: len(layers)]) * width  # of recomputed layers
    if training.activation_checkpoint_interval is None:
        again = 0.0
    tensor = (sum(part.bytes(width) for part in parts) + again) * tokens * (tp - 1) / tp
    boundaries = (not first) + (not last)
    pipeline = boundaries * tokens * model.hidden_size * width / (tp if sequence else 1)
    # Gradients are summed and shards of new weights spread: each as much as all of it. ZeRO 3 gathers weights twice.
    passes = training.global_batch_size // (data_size * training.micro_batch_size)
    gradient_width = WIDTH[config.precision.gradient_accumulation] if parallel.zero_stage == 1 else width
    data = parameters * (gradient_width + width) if parallel.zero_stage < 3 else parameters * width * 3 * passes
    if parallel.zero_stage == 2:
        data = parameters * (width * passes + width)
    return StepTraffic(tensor, pipeline, data * (data_size - 1) / data_size)


def _layer_parameters(config: RunConfig) -> list[int]:
    """Of each layer, on one rank of its tensor group; layers that are built alike are built once."""
    group = TensorParallelGroup(0, config.parallel.tensor_size, config.parallel.sequence)
    model = config.model
    kinds: dict[object, int] = {}

    def count(index: int) -> int:
        kind = (index in model.routed_layers, index == 0, index == model.num_layers - 1)
        if kind not in kinds:
            with torch.device("meta"):
                kinds[kind] = sum(prod(p.shape) for p in build_layer(model, index, group).parameters())
        return kinds[kind]

    return [count(index) for index in range(model.num_layers)]


def _norm_parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        norm = RowNorm(config.model.hidden_size, config.model.norm_epsilon, SINGLE_RANK)
    return sum(parameter.numel() for parameter in norm.parameters())


def _embedding_parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        embedding = TiedEmbedding(config.model, TensorParallelGroup(0, config.parallel.tensor_size))
    return embedding.weight.numel()
