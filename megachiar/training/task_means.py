"""Average over the steps between two lines of the log what single steps know too little of.

Few steps have a batch of every auxiliary task, and each measures the values of few tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megachiar.config.model import ModelConfig
from megachiar.engine.running_routers import ValueSums, value_layers
from megachiar.engine.step_metrics import TaskResult


class TaskMeans:
    """Sums of losses and gates of auxiliary tasks, weighted by their micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float, float]] = {}

    def add(self, results: Mapping[str, TaskResult]) -> None:
        """Add what the auxiliary tasks of a step gave."""
        for name, result in results.items():
            loss, gate, count = self._sums.get(name, (0.0, 0.0, 0.0))
            n = result.batches
            self._sums[name] = loss + n * result.loss, gate + n * result.gate, count + n

    def take(self) -> dict[str, float]:
        """Return the means since the last call, under TASK/loss and TASK/gate, of the tasks that had a batch."""
        sums, self._sums = self._sums, {}
        means: dict[str, float] = {}
        for name, (loss, gate, count) in sums.items():
            means |= {f"{name}/loss": loss / count, f"{name}/gate": gate / count}
        return means


class ValueMeans:
    """Sums of the values that learned routers have measured, layer by layer.

    Args:
        config: of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._sums: list[ValueSums] = []

    def add(self, values: Sequence[ValueSums]) -> None:
        """Add what a step has measured, in the order of the layers that measure."""
        if not values:
            return
        before = self._sums or [ValueSums()] * len(values)
        self._sums = [
            ValueSums(*(a + b for a, b in zip(old, new, strict=True))) for old, new in zip(before, values, strict=True)
        ]

    def take(self) -> dict[str, list[float]]:
        """Return which part of the values' mean square was predicted since the last call, one number a layer.

        It is nan in layers that measure nothing, and in all of them before there is a prediction. Nothing is returned
        where no layer measures.
        """
        layers = value_layers(self._config)
        sums, self._sums = self._sums, []
        if not layers:
            return {}
        explained = [float("nan")] * self._config.num_layers
        for layer, of_layer in zip(layers, sums, strict=bool(sums)):
            explained[layer] = of_layer.explained
        return {"value_explained": explained}
