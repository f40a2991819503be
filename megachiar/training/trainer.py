"""The training loop: take a step, log, evaluate, save, and stop when a signal asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.markup import escape

from megachiar.activity import Stage
from megachiar.checkpoint.format import add_validation, checkpoint_name, checkpoint_step
from megachiar.checkpoint.saver import CheckpointSaver
from megachiar.config import RunConfig
from megachiar.engine.engine import Engine
from megachiar.engine.micro_batches import MicroStep
from megachiar.engine.step_metrics import StepResult
from megachiar.errors import EXIT_STOPPED, UserError
from megachiar.phases import phase
from megachiar.topology import raise_together
from megachiar.training.asked import Asked, NothingAsked
from megachiar.training.bad_steps import BadStep, BadSteps, check_weights_are_finite
from megachiar.training.compare_ranks import RankComparison
from megachiar.training.continuation import Progress
from megachiar.training.display import Display
from megachiar.training.incident_record import checkpoint_to_spare
from megachiar.training.incidents import Incidents
from megachiar.training.kill_limit import KillLimit
from megachiar.training.metrics import ROLLBACK, SKIPPED, MetricsWriter
from megachiar.training.mixing import samples_of_tasks
from megachiar.training.profiling import Profiler
from megachiar.training.rollback import roll_back
from megachiar.training.rollback_record import write_rollback
from megachiar.training.run_data import RunData
from megachiar.training.run_events import BAD_STEP, ROLLED_BACK, SAVED
from megachiar.training.schedule import learning_rate
from megachiar.training.step_batches import StepBatches
from megachiar.training.step_log import Position, StepLog
from megachiar.training.supervision import Supervision
from megachiar.training.validation import Validation


class Trainer:
    """Train one run from its current step to its last.

    Args:
        engine: with the weights and optimizer state of ``progress``.
        data: that the run reads.
        progress: how far the run is; the trainer keeps it up to date.
        writer: of the metrics; None on all ranks but rank 0.
        display: of this rank.
        supervision: of this rank: stop signals, lock of the run folder, watch over the other ranks.
        damaged_data: returns the error of a block of data that this rank has found damaged; None if it found none.
        show: shows the run as it is, at its start and after each evaluation; None on all ranks but rank 0.
        asked: tasks and prompts of the run; None for none.
    """

    def __init__(
        self,
        engine: Engine,
        data: RunData,
        progress: Progress,
        writer: MetricsWriter | None,
        display: Display,
        supervision: Supervision,
        damaged_data: Callable[[], UserError | None],
        show: Callable[[Engine, RunData], None] | None = None,
        asked: Asked | None = None,
    ):
        self.engine = engine
        self.data = data
        self.progress = progress
        self.config: RunConfig = engine.config
        self.writer = writer
        self.display = display
        self.supervision = supervision
        self.activity = supervision.activity
        self.damaged_data = damaged_data
        self.events = supervision.events
        self._show = show
        asked = asked or NothingAsked()
        self._maximised = asked.maximised
        self.saver = CheckpointSaver(
            engine,
            progress.saved_step,
            display.line,
            self._report_saved,
            spared=lambda: checkpoint_to_spare(self.config.logging.folder),
            validation_data=data.validation_records(),
            maximised=asked.maximised,
        )
        self.bad_steps = BadSteps(self.config, progress.recent, self._newest_checkpoint(), progress.rollbacks)
        self.incidents = Incidents(self.config, engine.topology.describe(), display.line)
        self.comparison = RankComparison(engine)
        self.validation = Validation(
            engine, data.validation, writer, display, supervision, self._add_to_checkpoint, asked
        )
        self._skipped: list[int] = []  # steps left out since the run started or went back, for incidents
        self._plan: list[MicroStep] = []  # of the last step
        self._kill_limit = KillLimit()
        self.profiler = Profiler(self.config, engine.topology.rank, engine.device, display.line)
        self.log = StepLog(engine, writer, display, supervision.watch, progress.spent)

    def run(self, owed: Sequence[str] = ()) -> int:
        """Train to the last step; every rank calls this method.

        Args:
            owed: validation sets whose evaluation a stop has put off; they are evaluated first.

        Returns:
            The exit code of the process: 0, or 75 if a signal or ``training.stop_after`` stopped the run early.

        Raises:
            Diverged: the numbers of the run are bad and stay bad.
            LaunchError: a rank has found damaged data. Every rank raises it, and nothing more is saved.
        """
        with self.display.running(), self.saver:
            while True:
                with self._batches() as batches:
                    code = self._train(batches, owed)
                if code is not None:
                    return code
                self._roll_back()
                owed = ()

    def _train(self, batches: StepBatches, owed: Sequence[str]) -> int | None:
        """Train until the last step, a stop, or a step to roll back from; return the exit code, None to roll back."""
        self.log.set_axes(self._position())
        if self._stop_is_asked() or not self.validation.run(owed, self.progress.step, is_owed=True):
            return self._stopped()
        if self.progress.step == 0 and not self.validation.run_if_due(0, put_off=False):
            return self._stopped()
        self._show_run()
        while self.progress.step < self.config.steps:
            self.comparison.run_if_due(self.progress.step)
            self.profiler.begin_step(self.progress.step + 1)
            result, bad = self._timed_step(batches)
            if bad is not None and bad.action == "roll back":
                return None
            self.display.advance(self.progress.step, result.loss)
            self._log(result, batches)
            evaluated = self.validation.run_if_due(self.progress.step, put_off=result.stop)
            if self.validation.losses_after(self.progress.step):
                self._show_run()
            stop = not evaluated or (result.stop and self.progress.step < self.config.steps)
            self.saver.poll()
            self._save_if_due(stop)
            self.profiler.end_step(self.progress.step)
            if stop:
                self.profiler.close(self.progress.step)
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

    def _show_run(self) -> None:
        if self._show is not None:
            self.activity.begin("shows the run", Stage.SAVE, self.progress.step)
            self._show(self.engine, self.data)

    def _batches(self) -> StepBatches:
        return StepBatches(
            self.config,
            self.engine.topology,
            self.data,
            self.progress.samples,
            pin_memory=self.engine.device.type == "cuda",
        )

    def _timed_step(self, batches: StepBatches) -> tuple[StepResult, BadStep | None]:
        self.activity.begin_step()
        began = time.perf_counter()
        result = self._step(batches)
        seconds = time.perf_counter() - began
        self.activity.end_step(seconds)
        self.log.add_step(seconds, result[0], self._plan)
        return result

    def _step(self, batches: StepBatches) -> tuple[StepResult, BadStep | None]:
        stop = self.supervision.signals.reason() is not None or self.damaged_data() is not None
        step = self.progress.step + 1
        at_least_scale = self.engine.is_at_least_loss_scale
        rate = learning_rate(self.config, step)
        self.activity.begin("trains", Stage.TRAIN, step)
        self.comparison.begin_step()
        self._plan = batches.plan()
        read = batches.read(self._plan, self._reads, self._has_read)
        result = self.engine.train_step(read, rate, stop, self.bad_steps.accepts, self._plan)
        self.activity.begin("ends the step", Stage.LOG, step)
        if result.stop:  # one rank has damaged data, or was told to stop: only then the ranks ask one another
            raise_together(self.damaged_data())
        self.progress.step = step
        self.progress.samples += self.config.training.global_batch_size
        if result.skipped:
            self.saver.wait()  # the checkpoint that a message names, or the run goes back to, is complete
            self._record_skipped(step, result, rate)
        bad = self.bad_steps.judge(step, result, at_least_scale, self._newest_checkpoint())
        if bad is not None:
            self._report(bad, result)
        return result, bad

    def _record_skipped(self, step: int, result: StepResult, rate: float) -> None:
        """Note that a step was left out, for metrics and incidents: a replay leaves it out again."""
        self._skipped.append(step)
        if self.writer is not None:
            numbers = {"loss": result.loss, "gradient_norm": result.gradient_norm, "learning_rate": rate}
            self.writer.write(step, SKIPPED, numbers)

    def _report(self, bad: BadStep, result: StepResult) -> None:
        """Say that the last step was bad and record it; end the run if that is what follows."""
        step = self.progress.step
        self.display.line(f"[yellow]step {step}: {bad.reason}: {bad.action}[/]")
        self.events.write(BAD_STEP, step, {"reason": bad.reason, "action": bad.action})
        if self.engine.topology.is_main:
            self.incidents.record(step, bad, result, self.data, self._newest_checkpoint(), self._skipped)
        if bad.error is not None:
            raise bad.error

    def _roll_back(self) -> None:
        """Go back to the newest checkpoint, and leave out the samples of the last step."""
        bad_step, checkpoint = self.progress.step, self._newest_checkpoint()
        assert checkpoint is not None, "without a checkpoint no step is rolled back"
        state, self.data = roll_back(self.engine, self.data, bad_step, checkpoint)
        if self.engine.topology.is_main:
            self._record_rollback(checkpoint)
        self.progress.step, self.progress.samples = state.step, state.samples
        self.progress.saved_step = state.step
        self.bad_steps.roll_back(state.recent)
        self._skipped = []
        self.log.roll_back()
        self.comparison.begin_anew()
        if self.writer is not None:
            self.writer.rewind(state.step)
            self.writer.write(state.step, ROLLBACK, {"from_step": bad_step})
        self.events.write(ROLLED_BACK, state.step, {"from_step": bad_step})
        self.display.line(f"[yellow]back to {checkpoint}, without the samples of step {bad_step}[/]")

    def _record_rollback(self, checkpoint: Path) -> None:
        """Let a run that is started again before its next checkpoint leave out the same samples."""
        try:
            write_rollback(self.config.logging.folder, checkpoint, self.bad_steps.rollbacks, self.data.history)
        except UserError as error:
            self.display.line(f"[yellow]a restart before the next checkpoint rolls back again: {escape(str(error))}[/]")

    def _reads(self, number: int, sample: int) -> None:
        """Say that this rank is about to read micro-batch ``number`` of the step."""
        # Inner pipeline stages read nothing: only without stages do numbers of micro-batches compare.
        item = 2 * number if self.engine.topology.pipeline_size == 1 else 0
        self.activity.begin(f"reads sample {sample}", Stage.TRAIN, self.progress.step + 1, item)

    def _has_read(self, number: int, batch: np.ndarray) -> None:
        """Note what was read, and say that this rank computes micro-batch ``number``."""
        item = 2 * number + 1 if self.engine.topology.pipeline_size == 1 else 0
        self.comparison.add_samples(batch)
        self.activity.begin(f"computes micro-batch {number}", Stage.TRAIN, self.progress.step + 1, item)

    def _log(self, result: StepResult, batches: StepBatches) -> None:
        """Log the last step where a record is due, and tell the trackers how far the run is."""
        position = self._position()
        self.log.set_axes(position)
        if position.step % self.config.logging.every == 0 or position.step == self.config.steps:
            self.log.write(position, result, self.bad_steps.take_counts(), batches.take_wait_seconds())

    def _position(self) -> Position:
        samples = self.progress.samples
        # Labelled sequences have any number of tokens: their number is not known.
        is_labelled = self.config.tasks[0].head is not None
        tokens = None if is_labelled else self.data.history.tokens_before(samples)
        return Position(self.progress.step, samples, tokens)

    def _newest_checkpoint(self) -> Path | None:
        saved = self.saver.newest_step
        return None if saved is None else self.config.checkpoint_folder / checkpoint_name(saved)

    def _save_if_due(self, stop: bool) -> None:
        every, step = self.config.checkpoint.every, self.progress.step
        last = step == self.config.steps
        if not (stop or last or (every and step % every == 0)) or step == self.progress.saved_step:
            return
        self.activity.begin(f"saves step {step}", Stage.SAVE, step)
        if self.supervision.lock is not None:
            self.supervision.lock.confirm()
        self.comparison.run(step)
        self.saver.wait()  # the checkpoint that a message names is complete; the save below would wait anyway
        check_weights_are_finite(self.engine, step, self._newest_checkpoint())
        self.progress.saved_step = step
        losses = self.validation.losses_after(step)
        with phase("save"):
            self.saver.save(
                step,
                self.data.history,
                losses,
                recent=self.bad_steps.recent,
                auxiliary_samples=samples_of_tasks(self.config, self.data.tasks_read, self.progress.samples),
                spent=self.log.spent,
                must_succeed=stop or last,
            )

    def _add_to_checkpoint(self, step: int, measures: Mapping[str, float]) -> None:
        """Add the result of an evaluation that a stop had put off to the checkpoint, which was saved before it."""
        checkpoint = self._newest_checkpoint()
        if checkpoint is None or step != self.saver.newest_step or not self.engine.topology.is_main:
            return
        try:
            add_validation(checkpoint, measures, self._maximised)
        except UserError as error:
            problem = f"checkpoint.keep_best does not know {', '.join(measures)} of {checkpoint}: {error}"
            self.display.line(f"[yellow]{escape(problem)}[/]")

    def _report_saved(self, path: Path, seconds: float) -> None:
        self.display.line(f"saved {path} in {seconds:.1f} s")
        self.events.write(SAVED, checkpoint_step(path) or self.progress.step, {"seconds": seconds})
        if line := self._kill_limit.line(seconds):
            self.display.line(f"[yellow]{escape(line)}[/]")
