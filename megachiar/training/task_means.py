"""Average what auxiliary tasks report over the steps between two lines of the log, since few steps have all of them."""

from __future__ import annotations

from collections.abc import Mapping

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
