"""What a run writes every ``logging.every`` steps: a record of the metrics, and a line of the log.

Rates, times and the mean loss are those of all steps since the last record; losses, norms and shares those of the last.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape

from megachiar.checkpoint.format import Spent
from megachiar.engine.engine import Engine
from megachiar.engine.micro_batches import MicroStep
from megachiar.engine.step_metrics import StepResult
from megachiar.planning.peaks import peak_flops
from megachiar.training.bad_steps import Counts
from megachiar.training.display import Display
from megachiar.training.metrics import TRAIN, MetricsWriter
from megachiar.training.schedule import learning_rate
from megachiar.training.step_times import StragglerLog, measures_of
from megachiar.training.task_means import TaskMeans, ValueMeans
from megachiar.training.throughput import Throughput
from megachiar.training.watch import PeerWatch


@dataclass(frozen=True)
class Position:
    """How far the run is.

    Attributes:
        step: optimizer steps taken.
        samples: training samples that all ranks together have consumed.
        tokens: how many tokens they have; None where that is not known, as of labelled sequences.
    """

    step: int
    samples: int
    tokens: int | None


class StepLog:
    """Collects what steps report, and writes it.

    Args:
        engine: of the run.
        writer: of the metrics; None on all ranks but rank 0.
        display: of this rank.
        watch: over the other ranks.
        before: what the run had spent when this process began.
    """

    def __init__(self, engine: Engine, writer: MetricsWriter | None, display: Display, watch: PeerWatch, before: Spent):
        self._engine, self._config = engine, engine.config
        self._writer, self._display, self._watch = writer, display, watch
        self._before, self._began = before, time.perf_counter()
        self._throughput = Throughput(engine.config, engine.topology, peak_flops(engine.device))
        self._straggler_log = StragglerLog()
        self._task_means = TaskMeans()
        self._value_means = ValueMeans(engine.config.model)

    @property
    def spent(self) -> Spent:
        """Return what the run has spent up to now, in all its starts and with what it rolled back."""
        return Spent(
            seconds=self._before.seconds + time.perf_counter() - self._began,
            flops=self._before.flops + self._throughput.all_flops,
        )

    def add_step(self, seconds: float, result: StepResult, plan: Sequence[MicroStep]) -> None:
        """Add a step that took ``seconds`` and had the micro-batches of ``plan``."""
        self._throughput.add_step(seconds, plan, result.attention_share, result.rbf_share)
        self._task_means.add({} if result.skipped else result.tasks)
        self._value_means.add([] if result.skipped else result.values)

    def roll_back(self) -> None:
        """Begin to average anew, since the steps since the last record will be taken once more."""
        self._throughput.reset()
        self._engine.clock.take()
        self._task_means = TaskMeans()
        self._value_means = ValueMeans(self._config.model)

    def set_axes(self, position: Position) -> None:
        """Tell the trackers how far the run is, for the axes of their charts."""
        if self._writer is not None and self._writer.trackers is not None:
            self._writer.trackers.axes = _axes(position, self.spent)

    def write(self, position: Position, result: StepResult, counts: Counts, wait_seconds: float) -> None:
        """Write the record and the line.

        Args:
            position: of the run.
            result: of the last step.
            counts: what became of the steps since the last record.
            wait_seconds: how long training has waited for data since then.
        """
        straggler = self._watch.straggler()
        values = self._measures(position, result, counts, wait_seconds) | measures_of(straggler)
        if self._writer is not None:
            self._writer.write(position.step, TRAIN, values)
        left = self._display.time_left(position.step)
        self._display.line(describe(position.step, self._config.steps, values, self._config.model.routed_layers, left))
        if line := self._straggler_log.line(straggler):
            self._display.line(f"[yellow]{escape(line)}[/]")
        self._throughput.reset()

    def _measures(self, position: Position, result: StepResult, counts: Counts, wait_seconds: float) -> dict[str, Any]:
        return {
            "loss": result.loss,
            "mean_loss": counts.mean_loss,
            "regulariser": result.regulariser,
            "learning_rate": learning_rate(self._config, position.step),
            "gradient_norm": result.gradient_norm,
            "skipped": counts.skipped,
            "spikes": counts.spikes,
            "samples": position.samples,
            **_axes(position, self.spent),
            **self._throughput.measures(wait_seconds),
            **{f"{phase}_seconds": seconds for phase, seconds in self._engine.clock.take().items()},
            "attention_share": result.attention_share,
            "rbf_share": result.rbf_share,
            "entropy": result.entropy,
            "gate": result.gate,
            **self._task_means.take(),
            **self._value_means.take(),
            "memory_bytes": peak_memory_bytes(self._engine.device),
        }


def _axes(position: Position, spent: Spent) -> dict[str, float | None]:
    return {"tokens": position.tokens, "elapsed_seconds": spent.seconds, "flops": spent.flops}


def describe(step: int, steps: int, values: dict[str, Any], routed: range, left: str) -> str:
    """Return the line of the log for a step's metrics. Attention's share and H are means over routed layers."""
    loss = values["loss"] if values["mean_loss"] is None else values["mean_loss"]
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {loss:.4f}",
        f"lr {values['learning_rate']:.2e}",
        f"grad {values['gradient_norm']:.3f}",
        f"{values['tokens_per_second']:,.0f} tok/s",
    ]
    if routed:
        share, entropy = (statistics.fmean(values[name][i] for i in routed) for name in ("attention_share", "entropy"))
        parts += [f"attention {share:.0%} in routed layers", f"H {entropy:.4f}"]
    if math.isfinite(values["gate"]):
        parts.append(f"g {values['gate']:.3f}")
    if values["model_flops_utilisation"]:
        parts.append(f"MFU {values['model_flops_utilisation']:.1%}")
    parts += [f"{name} {value:.4f}" for name, value in values.items() if name.endswith("/loss")]
    if values["skipped"]:
        parts.append(f"{values['skipped']} skipped")
    if values["spikes"]:
        parts.append(f"{values['spikes']} spikes")
    return "  ".join([*parts, _describe_times(values), f"{left} left"])


def _describe_times(values: dict[str, Any]) -> str:
    """Return how long a step took, and the shares of its phases as far as they are known."""
    whole = values["step_seconds"]
    phases = ("data", "forward", "backward", "optimizer", "communication")
    known = ((phase, values[f"{phase}_seconds"]) for phase in phases)
    shares = ", ".join(f"{phase} {seconds / whole:.0%}" for phase, seconds in known if seconds is not None)
    return f"{whole:.3g} s/step" + (f" ({shares})" if shares else "")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most bytes that this rank has held: allocated on its GPU, or resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
