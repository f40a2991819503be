"""Estimate the time of a training step from config, layout and GPU.

    |-- micro-batches of the slowest stage --|-- bubble --|-- between replicas --|-- optimizer --|

A stage works on a micro-batch as ``kernel_times`` says, and waits for its tensor-parallel group, whose messages nothing
hides. Each further stage adds the time of one micro-batch, the pipeline's bubble. ZeRO 3 hides a part of its messages
behind work; those of other stages of ZeRO come after the last micro-batch. Ranks of a group that share a node send
through the network cards of all of them, but for ZeRO 3. Loading data and waiting for slow ranks are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

from megachiar.config import RunConfig
from megachiar.planning.gpus import Gpu
from megachiar.planning.kernel_times import WorkTime, head_work, layer_work, sum_of_works
from megachiar.planning.rank_plan import RankPlan
from megachiar.planning.step_tokens import micro_batches_of_replica

OPTIMIZER_BYTES = 34
"""Bytes that AdamW moves for each parameter: the fp32 gradient twice, for its norm and for the step; the master weight
and both moments there and back; and the new 16-bit weight."""

HIDDEN_PASSES = 4
"""How often a byte that hides behind work goes through memory, whose bandwidth the work then lacks: it is read to be
sent, written where it arrives, and copied into the buffer of the collective or out of it."""

ZERO_3_HIDES = 0.5
"""Share of the messages of DeepSpeed's ZeRO 3 that can hide behind work."""

NAMES = {
    "products": "products",
    "attention": "attention",
    "transforms": "DCTs",
    "memory": "memory",
    "tensor": "tp messages",
    "bubble": "bubble",
    "pipeline": "pp messages",
    "data": "dp messages",
    "optimizer": "optimizer",
}


@dataclass(frozen=True)
class Software:
    """What the time of a step depends on besides config and GPU; the defaults are this project's.

    Attributes:
        fused_attention: whether scores stay inside a kernel.
        chunks: pieces of the model that each pipeline rank holds, as in Megatron-LM's interleaved schedule.
        hides_data: share of the messages between replicas that can hide behind work; None for what DeepSpeed does,
            which hides ``ZERO_3_HIDES`` of ZeRO 3 and nothing of the others.
        hides_tensor: the same of the messages of a tensor-parallel group.
        shares_cards: whether the replicas of a node send through the network cards of all of them; None for what
            DeepSpeed does, whose ZeRO 3 reached the bandwidth of one.
        splits_pipeline: whether each rank of a tensor-parallel group sends its share of a message to the next stage, as
            Megatron-LM does, where each would send all of it.
    """

    fused_attention: bool = True
    chunks: float = 1
    hides_data: float | None = None
    hides_tensor: float = 0.0
    shares_cards: bool | None = None
    splits_pipeline: bool = False


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go to.

    Attributes:
        products: matrix products of projections, feed-forward and head.
        attention: scores, and their products with values.
        transforms: DCTs.
        memory: all that moves bytes and computes little.
        tensor: messages to the tensor-parallel group.
        bubble: waiting of pipeline stages that have no micro-batch.
        pipeline: messages to neighbouring stages.
        data: messages between replicas that nothing hides.
        optimizer: the optimizer's step.
    """

    products: float
    attention: float
    transforms: float
    memory: float
    tensor: float
    bubble: float
    pipeline: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """Return the seconds of the whole step."""
        return sum(getattr(self, field.name) for field in fields(self))

    def named(self) -> list[tuple[str, float]]:
        """Return the parts under the names that users read."""
        return [(NAMES[field.name], getattr(self, field.name)) for field in fields(self)]


def step_time(
    config: RunConfig,
    data_size: int,
    gpu: Gpu,
    gpus_per_node: int,
    stages: Sequence[RankPlan],
    software: Software = Software(),
) -> StepTime:
    """Return the estimated time of a step.

    Args:
        config: config of the run.
        data_size: number of data-parallel replicas.
        gpu: kind of all GPUs.
        gpus_per_node: number of GPUs that share a node.
        stages: the plan of a rank of each stage.
        software: what runs it.
    """
    parallel = config.parallel
    micro_batches = micro_batches_of_replica(config, data_size)
    work, tensor = _slowest_stage(config, gpu, gpus_per_node, stages, software, micro_batches)
    pace = work.total + tensor
    ranks = parallel.tensor_size * data_size * parallel.pipeline_size
    neighbour = gpu.node_bandwidth if ranks <= gpus_per_node else gpu.network_bandwidth
    of_deepspeed = ZERO_3_HIDES if parallel.zero_stage == 3 else 0.0
    data = _message_seconds(
        gpu,
        max(stage.communication.data for stage in stages),
        _data_bandwidth(config, data_size, gpu, gpus_per_node, software),
        of_deepspeed if software.hides_data is None else software.hides_data,
        pace * micro_batches,
    )
    pipeline = max(stage.communication.pipeline for stage in stages) * software.chunks / neighbour
    if software.splits_pipeline and not parallel.sequence:
        pipeline /= parallel.tensor_size
    stepped = max(stage.parameters for stage in stages) / (data_size if parallel.zero_stage else 1)
    return StepTime(
        products=work.products * micro_batches,
        attention=work.attention * micro_batches,
        transforms=work.transforms * micro_batches,
        memory=work.memory * micro_batches,
        tensor=tensor * micro_batches,
        bubble=pace * (parallel.pipeline_size - 1) / software.chunks,
        pipeline=pipeline,
        data=data,
        optimizer=stepped * OPTIMIZER_BYTES / gpu.memory_bandwidth,
    )


def _slowest_stage(
    config: RunConfig,
    gpu: Gpu,
    gpus_per_node: int,
    stages: Sequence[RankPlan],
    software: Software,
    micro_batches: float,
) -> tuple[WorkTime, float]:
    """Return the work of the slowest stage on a micro-batch, and the seconds that it then waits for its group."""
    bandwidth = _group_bandwidth(gpu, gpus_per_node, 1, config.parallel.tensor_size)
    times = []
    for stage in stages:
        work = _stage_work(config, gpu, stage, software, is_last=stage is stages[-1])
        sent = stage.communication.tensor / micro_batches
        times.append((work, _message_seconds(gpu, sent, bandwidth, software.hides_tensor, work.total)))
    return max(times, key=lambda time: time[0].total + time[1])


def _message_seconds(gpu: Gpu, sent: float, bandwidth: float, hides: float, work: float) -> float:
    """Return the seconds that messages of ``sent`` bytes add to ``work`` seconds, behind which a share ``hides``."""
    seconds = sent / bandwidth
    return seconds - hides * min(seconds, work) + (HIDDEN_PASSES * sent / gpu.memory_bandwidth if hides else 0.0)


def _data_bandwidth(config: RunConfig, data_size: int, gpu: Gpu, gpus_per_node: int, software: Software) -> float:
    """Return the bytes/s that a rank sends to the other replicas."""
    shares_cards = config.parallel.zero_stage < 3 if software.shares_cards is None else software.shares_cards
    reached = _group_bandwidth(gpu, gpus_per_node, config.parallel.tensor_size, data_size)
    within = config.parallel.tensor_size * data_size <= gpus_per_node
    return reached if within or shares_cards else min(reached, gpu.network_bandwidth)


def _group_bandwidth(gpu: Gpu, gpus_per_node: int, stride: int, size: int) -> float:
    """Return the bytes/s that a rank sends in a group of ``size`` ranks, each ``stride`` after the one before.

    The ranks of a group that share a node share their network cards.
    """
    if stride * size <= gpus_per_node:
        return gpu.node_bandwidth
    return min(gpu.node_bandwidth, gpu.network_bandwidth * max(1, gpus_per_node // stride))


def _stage_work(config: RunConfig, gpu: Gpu, stage: RankPlan, software: Software, is_last: bool) -> WorkTime:
    """Return the work of a rank of ``stage`` on a micro-batch; of equal layers one is estimated."""
    routed = config.model.routed_layers
    kinds = Counter((index in routed, index == 0) for index in stage.layers)
    examples = {(index in routed, index == 0): index for index in stage.layers}
    works = [
        layer_work(config, gpu, examples[kind], software.fused_attention).scaled(count) for kind, count in kinds.items()
    ]
    return sum_of_works(works + [head_work(config, gpu)] * is_last)
