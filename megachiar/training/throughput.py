"""Measure the rate of training: tokens and FLOPs a second, without the time of evaluations and saves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from megachiar.config import RunConfig
from megachiar.engine.micro_batches import MicroStep
from megachiar.planning.flops import training_flops_per_token
from megachiar.topology import Topology


class Throughput:
    """Counts seconds, tokens and model FLOPs since they were last read.

    Args:
        config: of the run.
        topology: of this rank.
        peak: FLOP/s of one device; None where it is not known.

    Attributes:
        all_flops: model FLOPs of all steps that were added, those before the last reset included.
    """

    def __init__(self, config: RunConfig, topology: Topology, peak: float | None):
        self._config, self._topology, self._peak = config, topology, peak
        self._tokens_at_once = config.training.micro_batch_size * topology.data_size * config.sequence_length
        self.all_flops = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self._seconds, self._flops, self._steps, self._tokens = 0.0, 0.0, 0, 0

    def add_step(
        self, seconds: float, plan: Sequence[MicroStep], attention_share: Sequence[float], rbf_share: Sequence[float]
    ) -> None:
        """Add a step.

        Args:
            seconds: that it took.
            plan: its micro-batches.
            attention_share, rbf_share: of its tokens, one value a layer.
        """
        tasks = self._config.tasks
        predicting = sum(tasks[micro_step.task].head is None for micro_step in plan) * self._tokens_at_once
        classifying = len(plan) * self._tokens_at_once - predicting
        model, length = self._config.model, self._config.sequence_length
        attention, rbf = statistics.fmean(attention_share), statistics.fmean(rbf_share)
        flops = sum(
            tokens * training_flops_per_token(model, length, attention, rbf, predicts_tokens=predicts)
            for tokens, predicts in ((predicting, True), (classifying, False))
            if tokens
        )
        self._seconds += seconds
        self._flops += flops
        self.all_flops += flops
        self._steps += 1
        self._tokens += predicting + classifying

    def measures(self, wait_seconds: float) -> dict[str, float | None]:
        """Return the rates since the last reset; ``wait_seconds`` is how long training has waited for data."""
        rate = self._flops / self._seconds
        return {
            "samples_per_second": self._steps * self._config.training.global_batch_size / self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
            "model_flops_per_second": rate,
            "model_flops_utilisation": rate / (self._topology.world_size * self._peak) if self._peak else None,
            "data_wait_share": wait_seconds / self._seconds,
            "step_seconds": self._seconds / self._steps,
        }
