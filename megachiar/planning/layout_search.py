"""Find the layouts that fit a config into a cluster, and estimate which of them is fastest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megachiar.config import ConfigError, RunConfig, parse_config
from megachiar.errors import UserError
from megachiar.planning.clock import StepTime, step_time
from megachiar.planning.gpus import Gpu
from megachiar.planning.rank_plan import plan_ranks
from megachiar.planning.step_tokens import step_flops


@dataclass(frozen=True)
class Machine:
    """A cluster of GPUs.

    Attributes:
        gpus: number of GPUs.
        gpus_per_node: number of GPUs that share a node.
        memory: bytes of each GPU that a run may use.
        gpu: the kind of all GPUs.
    """

    gpus: int
    gpus_per_node: int
    memory: float
    gpu: Gpu


@dataclass(frozen=True)
class LayoutCandidate:
    """A layout that fits the run into the cluster.

    Attributes:
        config: config of the run under this layout.
        overrides: its differences from the given config, in the form that ``--set`` takes.
        memory: bytes on the rank that needs the most.
        time: estimated time of a step.
        utilisation: MFU; None where the peak of the GPU is not known.
    """

    config: RunConfig
    overrides: list[str]
    memory: float
    time: StepTime
    utilisation: float | None

    @property
    def seconds(self) -> float:
        """Return the estimated seconds of a step."""
        return self.time.total

    @property
    def reason(self) -> str:
        """Return the parts of a step's time in words, the largest first."""
        parts = sorted(((seconds / self.seconds, name) for name, seconds in self.time.named()), reverse=True)
        words = [f"{name} {share:.0%}" for share, name in parts if share >= 0.01]
        recomputed = self.config.training.activation_checkpoint_interval is not None
        return ", ".join(words + ["recomputed"] * recomputed)


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
        time = step_time(candidate, data_size, machine.gpu, machine.gpus_per_node, stages)
        peak = machine.gpu.peak
        fitting.append(
            LayoutCandidate(
                config=candidate,
                overrides=[f"{key}={_yaml_scalar(value)}" for key, value in overrides.items()],
                memory=memory,
                time=time,
                utilisation=step_flops(candidate, candidate.model) / time.total / machine.gpus / peak if peak else None,
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


def _divisors(n: int) -> list[int]:
    """Return the divisors of ``n``, ascending."""
    return [i for i in range(1, n + 1) if n % i == 0]
