"""Measure the rate of training: tokens and FLOPs a second, without the time of evaluations and saves."""

from __future__ import annotations

from collections.abc import Sequence

from megachiar.config import RunConfig
from megachiar.engine.micro_batches import MicroStep
from megachiar.planning.flops import training_flops_per_token
from megachiar.topology import Topology


class Throughput:
    """Counts seconds and tokens since they were last read.

    Args:
        config: of the run.
        topology: of this rank.
        peak: FLOP/s of one device; None where it is not known.
    """

    def __init__(self, config: RunConfig, topology: Topology, peak: float | None):
        self._config, self._topology, self._peak = config, topology, peak
        self._tokens_at_once = config.training.micro_batch_size * topology.data_size * config.sequence_length
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self._seconds, self._samples, self._predicting, self._classifying = 0.0, 0, 0, 0

    def add_step(self, seconds: float, plan: Sequence[MicroStep]) -> None:
        """Add a step that took ``seconds`` and had the micro-batches of ``plan``."""
        tasks = self._config.tasks
        predicting = sum(tasks[micro_step.task].head is None for micro_step in plan)
        self._seconds += seconds
        self._samples += self._config.training.global_batch_size
        self._predicting += predicting * self._tokens_at_once
        self._classifying += (len(plan) - predicting) * self._tokens_at_once

    def measures(self, attention_share: float, rbf_share: float, wait_seconds: float) -> dict[str, float | None]:
        """Return the rates since the last reset.

        Args:
            attention_share, rbf_share: mean over all layers.
            wait_seconds: how long training has waited for data.
        """
        model, length = self._config.model, self._config.sequence_length
        flops = 0.0
        for tokens, predicts in ((self._predicting, True), (self._classifying, False)):
            if tokens:
                of_token = training_flops_per_token(model, length, attention_share, rbf_share, predicts_tokens=predicts)
                flops += tokens * of_token
        rate = flops / self._seconds
        return {
            "samples_per_second": self._samples / self._seconds,
            "tokens_per_second": (self._predicting + self._classifying) / self._seconds,
            "model_flops_per_second": rate,
            "model_flops_utilisation": rate / (self._topology.world_size * self._peak) if self._peak else None,
            "data_wait_share": wait_seconds / self._seconds,
        }
