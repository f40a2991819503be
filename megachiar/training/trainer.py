"""The training loop: take a step, log, evaluate, save, and stop when a signal asks for it."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.markup import escape

from megachiar.activity import Stage
from megachiar.checkpoint.save import save_checkpoint
from megachiar.config import RunConfig
from megachiar.data.sampling.loader import BatchLoader
from megachiar.engine.engine import Engine
from megachiar.engine.step_metrics import StepResult
from megachiar.errors import EXIT_STOPPED, UserError
from megachiar.planning.flops import training_flops_per_token
from megachiar.training.compare_ranks import compare_ranks
from megachiar.training.continuation import Progress
from megachiar.training.display import Display
from megachiar.training.kill_limit import KillLimit
from megachiar.training.metrics import MetricsWriter, peak_memory_bytes
from megachiar.training.peaks import peak_flops
from megachiar.training.run_data import RunData
from megachiar.training.schedule import learning_rate
from megachiar.training.step_times import StragglerLog, measures_of
from megachiar.training.supervision import Supervision
from megachiar.training.validation import Validation


class Diverged(UserError):
    """The loss became infinite or nan, on every rank alike."""

    same_on_every_rank = True


class Trainer:
    """Train one run from its current step to its last.

    Args:
        engine: with the weights and optimizer state of ``progress``.
        data: that the run reads.
        progress: how far the run is; the trainer keeps it up to date.
        writer: of the metrics; None on all ranks but rank 0.
        display: of this rank.
        supervision: of this rank: stop signals, lock of the run folder, watch over the other ranks.
    """

    def __init__(
        self,
        engine: Engine,
        data: RunData,
        progress: Progress,
        writer: MetricsWriter | None,
        display: Display,
        supervision: Supervision,
    ):
        self.engine = engine
        self.data = data
        self.progress = progress
        self.config: RunConfig = engine.config
        self.writer = writer
        self.display = display
        self.supervision = supervision
        self.activity = supervision.activity
        self.peak = peak_flops(engine.device)
        self.validation = Validation(engine, data.validation, writer, display, supervision)
        self._straggler_log = StragglerLog()
        self._kill_limit = KillLimit()
        # Seconds and steps of training alone, without evaluation and saving, since the last line of the log.
        self._seconds, self._steps = 0.0, 0
        self._samples_digest = 0  # of the samples that this rank has read in the last step
        self._compared_step: int | None = None  # the step after which the ranks were last compared

    def run(self, owed: Sequence[str] = ()) -> int:
        """Train to the last step; every rank calls this method.

        Args:
            owed: validation sets whose evaluation a stop has put off; they are evaluated first.

        Returns:
            The exit code of the process: 0, or 75 if a signal or ``training.stop_after`` stopped the run early.

        Raises:
            Diverged: the loss became infinite or nan.
        """
        with self._loader() as loader, self.display.running():
            if self._stop_is_asked() or not self.validation.run(owed, self.progress.step):
                return self._stopped()
            while self.progress.step < self.config.steps:
                self._compare_if_due()
                result = self._timed_step(loader)
                self.display.advance(self.progress.step, result.loss)
                self._log(result, loader)
                evaluated = self.validation.run_if_due(self.progress.step, put_off=result.stop)
                stop = not evaluated or (result.stop and self.progress.step < self.config.steps)
                self._save_if_due(stop)
                if stop:
                    return self._stopped()
        return 0

    def _stop_is_asked(self) -> bool:
        """Return whether any rank got a signal before the first step; every rank calls this method.

        ``training.stop_after`` does not count yet: a run that is started again and again must make a step each time.
        """
        return self.engine.sum_over_world([float(self.supervision.signals.received is not None)])[0] > 0

    def _stopped(self) -> int:
        why = self.supervision.signals.reason() or "a signal to another rank"
        saved = ", saved" if self.progress.step == self.progress.saved_step else ""
        when = f"after step {self.progress.step}" if self.progress.step else "before the first step"
        self.display.line(f"stopped by {why} {when}{saved}")
        return EXIT_STOPPED

    def _loader(self) -> BatchLoader:
        training, topology = self.config.training, self.engine.topology
        return BatchLoader(
            self.data.training,
            training.micro_batch_size,
            self.engine.accumulation_steps,
            topology.data_rank,
            topology.data_size,
            self.progress.samples,
            prefetch=self.config.data.prefetch,
            pin_memory=self.engine.device.type == "cuda",
        )

    def _timed_step(self, loader: BatchLoader) -> StepResult:
        self.activity.begin_step()
        began = time.perf_counter()
        result = self._step(loader)
        seconds = time.perf_counter() - began
        self.activity.end_step(seconds)
        self._seconds, self._steps = self._seconds + seconds, self._steps + 1
        return result

    def _step(self, loader: BatchLoader) -> StepResult:
        stop = self.supervision.signals.reason() is not None
        step = self.progress.step + 1
        self.activity.begin("trains", Stage.TRAIN, step)
        result = self.engine.train_step(self._micro_batches(loader, step), learning_rate(self.config, step), stop)
        self.activity.begin("ends the step", Stage.LOG, step)
        self.progress.step = step
        self.progress.samples += self.config.training.global_batch_size
        if not math.isfinite(result.loss):
            raise Diverged(
                f"step {self.progress.step}",
                f"the loss is {result.loss}",
                "resume from the last checkpoint with a lower optimizer.learning_rate, a longer warm-up or bf16",
            )
        return result

    def _micro_batches(self, loader: BatchLoader, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield this replica's micro-batches of a step, each with the position of its first sample."""
        offset = self.engine.topology.data_rank * self.config.training.micro_batch_size  # of this replica's samples
        self._samples_digest = 0
        for number in range(1, self.engine.accumulation_steps + 1):
            first = loader.position + offset
            # Inner pipeline stages read nothing: only without stages do numbers of micro-batches compare.
            item = 2 * number if self.engine.topology.pipeline_size == 1 else 0
            self.activity.begin(f"reads sample {first}", Stage.TRAIN, step, item)
            batch = next(loader)
            self._samples_digest = zlib.crc32(batch.data, self._samples_digest)
            self.activity.begin(f"computes micro-batch {number}", Stage.TRAIN, step, item and item + 1)
            yield first, batch

    def _compare_if_due(self) -> None:
        every, step = self.config.reliability.check_every, self.progress.step
        if self._compared_step is None or (every and step % every == 0):
            self._compare()

    def _compare(self) -> None:
        if self._compared_step != self.progress.step:
            self.activity.begin("compares the ranks", Stage.LOG, self.progress.step, item=1)
            compare_ranks(self.engine, self.progress.step, self._samples_digest)
            self._compared_step = self.progress.step

    def _log(self, result: StepResult, loader: BatchLoader) -> None:
        step = self.progress.step
        if step % self.config.logging.every and step != self.config.steps:
            return
        straggler = self.supervision.watch.straggler()
        values = self._measures(result, loader) | measures_of(straggler)
        if self.writer is not None:
            self.writer.write(step, "train", values)
        self.display.line(_describe(step, self.config.steps, values, self.display.time_left(step)))
        if line := self._straggler_log.line(straggler):
            self.display.line(f"[yellow]{escape(line)}[/]")
        self._seconds, self._steps = 0.0, 0

    def _measures(self, result: StepResult, loader: BatchLoader) -> dict[str, Any]:
        """Return the metrics of the last step, with rates over all steps since the last line of the log."""
        config, topology = self.config, self.engine.topology
        tokens = self._steps * config.training.global_batch_size * config.sequence_length
        rate = tokens / self._seconds
        shares = (sum(shares) / len(shares) for shares in (result.attention_share, result.rbf_share))
        flops = training_flops_per_token(config.model, config.sequence_length, *shares)
        return {
            "loss": result.loss,
            "regulariser": result.regulariser,
            "learning_rate": learning_rate(config, self.progress.step),
            "gradient_norm": result.gradient_norm,
            "skipped": result.skipped,
            "samples": self.progress.samples,
            "tokens": self.data.history.tokens_before(self.progress.samples),
            "tokens_per_second": rate,
            "model_flops_per_second": rate * flops,
            "model_flops_utilisation": rate * flops / (topology.world_size * self.peak) if self.peak else None,
            "data_wait_share": loader.take_wait_seconds() / self._seconds,
            "attention_share": result.attention_share,
            "rbf_share": result.rbf_share,
            "entropy": result.entropy,
            "gate": result.gate,
            "memory_bytes": peak_memory_bytes(self.engine.device),
        }

    def _save_if_due(self, stop: bool) -> None:
        every, step = self.config.checkpoint.every, self.progress.step
        last = step == self.config.steps
        if not (stop or last or (every and step % every == 0)) or step == self.progress.saved_step:
            return
        self._compare()
        self.activity.begin(f"saves step {step}", Stage.SAVE, step)
        if self.supervision.lock is not None:
            self.supervision.lock.confirm()
        began = time.perf_counter()
        path = save_checkpoint(self.engine, step, self.data.history, self.config.checkpoint.keep)
        self.progress.saved_step = step
        seconds = time.perf_counter() - began
        self.display.line(f"saved {path} in {seconds:.1f} s")
        if line := self._kill_limit.line(seconds):
            self.display.line(f"[yellow]{escape(line)}[/]")


def _describe(step: int, steps: int, values: dict[str, Any], left: str) -> str:
    """Return the line of the log for a step's metrics."""
    routed = [h for h in values["entropy"] if h is not None and math.isfinite(h)]
    parts = [
        f"step {step:>{len(str(steps))}}/{steps}",
        f"loss {values['loss']:.4f}",
        f"lr {values['learning_rate']:.2e}",
        f"grad {values['gradient_norm']:.3f}",
        f"{values['tokens_per_second']:,.0f} tok/s",
        f"attention {sum(values['attention_share']) / len(values['attention_share']):.0%}",
    ]
    if routed:
        parts.append(f"H {sum(routed) / len(routed):.4f}")
    if math.isfinite(values["gate"]):
        parts.append(f"g {values['gate']:.3f}")
    if values["model_flops_utilisation"]:
        parts.append(f"MFU {values['model_flops_utilisation']:.1%}")
    if values["skipped"]:
        parts.append("overflow: step skipped")
    return "  ".join([*parts, f"{left} left"])
