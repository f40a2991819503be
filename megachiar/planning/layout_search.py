"""Which layouts a config fits a cluster in, and which of them should be fastest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megachiar.config import ConfigError, RunConfig, parse_config
from megachiar.errors import UserError
from megachiar.planning.rank_plan import RankPlan, plan_ranks


@dataclass(frozen=True)
class Machine:
    """A cluster.

    Attributes:
        gpus, gpus_per_node: in all, and those that share a node.
        memory: bytes of a GPU that a run may use.
        flops: FLOP/s a GPU reaches in matrix products.
        node_bandwidth, network_bandwidth: bytes/s a GPU sends within its node and beyond.
    """

    gpus: int
    gpus_per_node: int
    memory: float
    flops: float
    node_bandwidth: float
    network_bandwidth: float


@dataclass(frozen=True)
class LayoutCandidate:
    """A layout that fits.

    Attributes:
        config: of the run under it.
        overrides: what differs from the config that was given, as ``--set`` takes it.
        memory: bytes of its fullest rank.
        seconds: of a step, estimated.
        reason: where the time goes.
    """

    config: RunConfig
    overrides: list[str]
    memory: float
    seconds: float
    reason: str


def find_layouts(config: RunConfig, machine: Machine) -> tuple[list[LayoutCandidate], Counter[str]]:
    """Layouts of all GPUs, fastest first, and why others were left out. The batch and the model stay as they are."""
    fitting: list[LayoutCandidate] = []
    refused: Counter[str] = Counter()
    for overrides in _candidates(config, machine):
        try:
            candidate = _with(config, overrides)
            stages = plan_ranks(candidate, candidate.parallel.data_size)
        except (ConfigError, UserError):
            refused["do not divide the model or the batch"] += 1
            continue
        memory = max(stage.memory.total for stage in stages)
        if memory > machine.memory:
            refused["need too much memory"] += 1
            continue
        seconds, reason = _time(candidate, machine, stages)
        text = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides.items()]
        fitting.append(LayoutCandidate(candidate, text, memory, seconds, reason))
    return sorted(fitting, key=lambda layout: (layout.seconds, layout.memory)), refused


def _candidates(config: RunConfig, machine: Machine) -> Iterator[dict[str, object]]:
    """Overrides of all layouts worth a look: a tensor group stays within a node."""
    model = config.model
    for tp in _divisors(machine.gpus_per_node):
        for pp in _divisors(machine.gpus // tp):
            if machine.gpus % (tp * pp) or pp > model.num_layers:
                continue
            dp = machine.gpus // (tp * pp)
            share, rest = divmod(config.training.global_batch_size, dp)
            if rest:
                continue
            for micro in (size for size in (1, 2, 4, 8, 16, 32) if share % size == 0):
                for zero in (1,) if pp > 1 else (1, 2, 3) if dp > 1 else (1,):
                    for recompute in (None, 1):
                        yield {
                            "parallel.pipeline_size": pp,
                            "parallel.tensor_size": tp,
                            "parallel.data_size": dp,
                            "parallel.sequence": tp > 1 and micro * config.sequence_length % tp == 0,
                            "parallel.zero_stage": zero,
                            "training.micro_batch_size": micro,
                            "training.activation_checkpoint_interval": recompute or "null",
                        }


def _with(config: RunConfig, overrides: dict[str, object]) -> RunConfig:
    mapping = config.model_dump(mode="json")
    for key, value in overrides.items():
        section, name = key.split(".")
        mapping[section][name] = None if value == "null" else value
    return parse_config(mapping, "layout")


def _time(config: RunConfig, machine: Machine, stages: list[RankPlan]) -> tuple[float, str]:
    """Seconds of a step and where they go."""
    parallel, training = config.parallel, config.training
    micro_batches = training.global_batch_size // (training.micro_batch_size * parallel.data_size)
    arithmetic = max(stage.flops for stage in stages) / machine.flops
    bubble = arithmetic * (parallel.pipeline_size - 1) / micro_batches
    tensor = max(stage.traffic.tensor for stage in stages) / machine.node_bandwidth
    in_node = parallel.tensor_size * parallel.data_size <= machine.gpus_per_node
    between = machine.node_bandwidth if in_node else machine.network_bandwidth
    data = max(stage.traffic.data for stage in stages) / between
    pipeline = max(stage.traffic.pipeline for stage in stages) / machine.network_bandwidth
    shares = {"bubble": bubble, "tensor traffic": tensor, "stages' traffic": pipeline, "replicas' traffic": data}
    seconds = arithmetic + sum(shares.values())
    listed = [f"{name} {part / seconds:.0%}" for name, part in shares.items() if part / seconds >= 0.005]
    extra = ["forward passes are done again"] if training.activation_checkpoint_interval else []
    return seconds, ", ".join([f"arithmetic {arithmetic / seconds:.0%}", *listed, *extra])


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]
