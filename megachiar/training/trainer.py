"""The training loop: take a step, log, evaluate, save, and stop when a signal asks for it."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megachiar.checkpoint.saver import CheckpointSaver
from megachiar.config import RunConfig
from megachiar.data.sampling.loader import BatchLoader
from megachiar.engine.engine import Engine
from megachiar.engine.step_metrics import StepResult
from megachiar.errors import UserError
from megachiar.launch import EXIT_STOPPED, StopSignals
from megachiar.planning.flops import training_flops_per_token
from megachiar.training.compare_ranks import compare_ranks
from megachiar.training.continuation import Progress
from megachiar.training.display import Display
from megachiar.training.evaluation import evaluate
from megachiar.training.metrics import MetricsWriter, peak_memory_bytes
from megachiar.training.peaks import peak_flops
from megachiar.training.run_data import RunData
from megachiar.training.schedule import learning_rate


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
        signals: that stop the run after a checkpoint.
        check_data: raises an error if data that was read is found to be damaged.
    """

    def __init__(
        self,
        engine: Engine,
        data: RunData,
        progress: Progress,
        writer: MetricsWriter | None,
        display: Display,
        signals: StopSignals,
        check_data: Callable[[], None],
    ):
        self.engine = engine
        self.data = data
        self.progress = progress
        self.config: RunConfig = engine.config
        self.writer = writer
        self.display = display
        self.signals = signals
        self.check_data = check_data
        self.saver = CheckpointSaver(engine, display.line)
        self.peak = peak_flops(engine.device)
        # Seconds and steps of training alone, without evaluation and saving, since the last line of the log.
        self._seconds, self._steps = 0.0, 0
        self._samples_digest = 0  # of the samples that this rank has read in the last step
        self._compared_step: int | None = None  # the step after which the ranks were last compared

    def run(self) -> int:
        """Train to the last step; every rank calls this method.

        Returns:
            The exit code of the process: 0, or 75 if a signal stopped the run early.

        Raises:
            Diverged: the loss became infinite or nan.
        """
        with self._loader() as loader, self.display.running(), self.saver:
            while self.progress.step < self.config.steps:
                self._compare_if_due()
                began = time.perf_counter()
                result = self._step(loader)
                self._seconds, self._steps = self._seconds + time.perf_counter() - began, self._steps + 1
                self.display.advance(self.progress.step, result.loss)
                self._log(result, loader)
                losses = self._evaluate_if_due()
                self.saver.poll()
                self._save_if_due(result.stop, losses)
                if result.stop and self.progress.step < self.config.steps:
                    self.display.line(f"stopped by a signal after step {self.progress.step}, saved")
                    return EXIT_STOPPED
        return 0

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
            check=self.check_data,
        )

    def _step(self, loader: BatchLoader) -> StepResult:
        stop = self.signals.received is not None
        step = self.progress.step + 1
        result = self.engine.train_step(self._micro_batches(loader), learning_rate(self.config, step), stop)
        self.progress.step = step
        self.progress.samples += self.config.training.global_batch_size
        if not math.isfinite(result.loss):
            raise Diverged(
                f"step {self.progress.step}",
                f"the loss is {result.loss}",
                "resume from the last checkpoint with a lower optimizer.learning_rate, a longer warm-up or bf16",
            )
        return result

    def _micro_batches(self, loader: BatchLoader) -> Iterator[tuple[int, np.ndarray]]:
        """Yield this replica's micro-batches of a step, each with the position of its first sample."""
        offset = self.engine.topology.data_rank * self.config.training.micro_batch_size  # of this replica's samples
        self._samples_digest = 0
        for _ in range(self.engine.accumulation_steps):
            position, batch = loader.position + offset, next(loader)
            self._samples_digest = zlib.crc32(batch.data, self._samples_digest)
            yield position, batch

    def _compare_if_due(self) -> None:
        every, step = self.config.reliability.check_every, self.progress.step
        if self._compared_step is None or (every and step % every == 0):
            self._compare()

    def _compare(self) -> None:
        if self._compared_step != self.progress.step:
            compare_ranks(self.engine, self.progress.step, self._samples_digest)
            self._compared_step = self.progress.step

    def _log(self, result: StepResult, loader: BatchLoader) -> None:
        step = self.progress.step
        if step % self.config.logging.every and step != self.config.steps:
            return
        values = self._measures(result, loader)
        if self.writer is not None:
            self.writer.write(step, "train", values)
        self.display.line(_describe(step, self.config.steps, values, self.display.time_left(step)))
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

    def _evaluate_if_due(self) -> dict[str, float]:
        """Return the loss of each validation set in nats a token; nothing where no evaluation is due."""
        every, step = self.config.training.evaluate_every, self.progress.step
        if step != self.config.steps and not (every and step % every == 0):
            return {}
        losses = {}
        topology = self.engine.topology
        for name, dataset in self.data.validation.items():
            result = evaluate(
                self.engine.evaluate,
                dataset,
                self.config.training.micro_batch_size,
                windows=self.config.training.evaluation_windows,
                rank=topology.data_rank,
                ranks=topology.data_size,
                reduce_sum=self.engine.sum_over_world,
            )
            if self.writer is not None:
                self.writer.write(step, f"evaluation/{name}", result.as_dict())
            losses[name] = result.loss
            word = f"  word PPL {result.word_ppl:.2f}" if result.word_ppl else ""
            bits = f"  {result.bits_per_byte:.4f} bits/byte" if result.bits_per_byte else ""
            self.display.line(
                f"[bold]step {step}  {name}: loss {result.loss:.4f}  token PPL {result.token_ppl:.2f}{word}{bits}[/]"
            )

        return losses

    def _save_if_due(self, stop: bool, losses: dict[str, float]) -> None:
        every, step = self.config.checkpoint.every, self.progress.step
        last = step == self.config.steps
        if not (stop or last or (every and step % every == 0)) or step == self.progress.saved_step:
            return
        self._compare()
        measured = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        self.progress.saved_step = step
        self.saver.save(step, self.data.history, measured, must_succeed=stop or last)


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
