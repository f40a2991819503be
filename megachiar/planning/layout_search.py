"""Find the layouts that fit a config into a cluster, and estimate which of them is fastest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megachiar.config import ConfigError, RunConfig, parse_config
from megachiar.errors import UserError
from megachiar.planning.rank_plan import RankPlan, plan_ranks
from megachiar.planning.step_tokens import micro_batches_of_replica


@dataclass(frozen=True)
class Machine:
    """A cluster of GPUs.

    Attributes:
        gpus: number of GPUs.
        gpus_per_node: number of GPUs that share a node.
        memory: bytes of each GPU that a run may use.
        flops: FLOP/s that a GPU reaches in matrix products.
        node_bandwidth: bytes/s that a GPU sends within its node.
        network_bandwidth: bytes/s that a GPU sends to other nodes.
    """

    gpus: int
    gpus_per_node: int
    memory: float
    flops: float
    node_bandwidth: float
    network_bandwidth: float


@dataclass(frozen=True)
class LayoutCandidate:
    """A layout that fits the run into the cluster.

    Attributes:
        config: config of the run under this layout.
        overrides: its differences from the given config, in the form that ``--set`` takes.
        memory: bytes on the rank that needs the most.
        seconds: estimated time of a step.
        reason: the parts of a step's time, in words.
    """

    config: RunConfig
    overrides: list[str]
    memory: float
    seconds: float
    reason: str


def find_layouts(config: RunConfig, machine: Machine) -> tuple[list[LayoutCandidate], Counter[str]]:
    """Return the layouts that use all GPUs, fastest first, and for each reason the number of layouts left out.

    The model and the global batch are those of ``config`` in every layout.
    """
    fitting: list[LayoutCandidate] = []
    refused: Counter[str] = Counter()
    for data_size, overrides in _candidates(config, machine):
        try:
            candidate = _with_overrides(config, overrides)
            stages = plan_ranks(candidate, data_size)
        except (ConfigError, UserError):
            refused["do not divide the model or the batch"] += 1
            continue
        memory = max(stage.memory.total for stage in stages)
        if memory > machine.memory:
            refused["need too much memory"] += 1
            continue
        seconds, reason = _estimate_step_time(candidate, data_size, machine, stages)
        fitting.append(
            LayoutCandidate(
                config=candidate,
                overrides=[f"{key}={_yaml_scalar(value)}" for key, value in overrides.items()],
                memory=memory,
                seconds=seconds,
                reason=reason,
            )
        )
    return sorted(fitting, key=lambda layout: (layout.seconds, layout.memory)), refused


def _candidates(config: RunConfig, machine: Machine) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield data-parallel size and overrides of each layout to plan; a tensor-parallel group stays within a node."""
    model = config.model
    for tp in _divisors(machine.gpus_per_node):
        for pp in _divisors(machine.gpus // tp):
            if machine.gpus % (tp * pp) or pp > model.num_layers:
                continue
            dp = machine.gpus // (tp * pp)
            replica_batch, rest = divmod(config.training.global_batch_size, dp)
            if rest:
                continue
            micro_batch_sizes = [size for size in (1, 2, 4, 8, 16, 32) if replica_batch % size == 0]
            zero_stages = (1, 2, 3) if pp == 1 and dp > 1 else (1,)
            for micro, zero, recompute in product(micro_batch_sizes, zero_stages, (None, 1)):
                overrides: dict[str, object] = {
                    "parallel.pipeline_size": pp,
                    "parallel.tensor_size": tp,
                    "parallel.data_size": dp,
                    "parallel.sequence": tp > 1 and micro * config.sequence_length % tp == 0,
                    "parallel.zero_stage": zero,
                    "training.micro_batch_size": micro,
                    "training.activation_checkpoint_interval": recompute,
                }
                yield dp, overrides


def _with_overrides(config: RunConfig, overrides: dict[str, object]) -> RunConfig:
    """Return ``config`` with other values for some keys, such as ``parallel.tensor_size``."""
    mapping = config.model_dump(mode="json")
    for key, value in overrides.items():
        section, name = key.split(".")
        mapping[section][name] = value
    return parse_config(mapping, "layout")


def _yaml_scalar(value: object) -> str:
    """Return an integer, a truth value or None as YAML writes it."""
    return "null" if value is None else str(value).lower()


def _estimate_step_time(
    config: RunConfig, data_size: int, machine: Machine, stages: list[RankPlan]
) -> tuple[float, str]:
    """Return the estimated seconds of a step, and their parts in words.

    The slowest stage counts. No communication is assumed to overlap with arithmetic.
    """
    parallel, training = config.parallel, config.training
    micro_batches = micro_batches_of_replica(config, data_size)
    arithmetic = max(stage.flops for stage in stages) / machine.flops
    is_replicated_in_node = parallel.tensor_size * data_size <= machine.gpus_per_node
    data_bandwidth = machine.node_bandwidth if is_replicated_in_node else machine.network_bandwidth
    overheads = {
        "pipeline bubble": arithmetic * (parallel.pipeline_size - 1) / micro_batches,
        "tensor-parallel communication": max(stage.communication.tensor for stage in stages) / machine.node_bandwidth,
        "pipeline communication": max(stage.communication.pipeline for stage in stages) / machine.network_bandwidth,
        "data-parallel communication": max(stage.communication.data for stage in stages) / data_bandwidth,
    }
    seconds = arithmetic + sum(overheads.values())
    shares = [f"{name} {part / seconds:.0%}" for name, part in overheads.items() if part / seconds >= 0.005]
    recomputation = ["forward passes are recomputed"] if training.activation_checkpoint_interval else []
    return seconds, ", ".join([f"arithmetic {arithmetic / seconds:.0%}", *shares, *recomputation])


def _divisors(n: int) -> list[int]:
    """Return the divisors of ``n``, ascending."""
    return [i for i in range(1, n + 1) if n % i == 0]
