"""Judge each step: was it good, is it left out, and does the run go on?

    numbers                                 on_spike: ignore   skip       rollback    stop
    loss or gradients not finite            left out           left out   roll back   stop
    spike                                   taken, a warning   left out   roll back   stop
    fp16 gradients above the loss scale     left out; the scale is lowered

Whether a step is left out is decided before it changes anything (``BadSteps.accepts``). What follows is decided after
it (``BadSteps.judge``). All ranks decide alike, since they have the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megachiar.checkpoint.format import NO_STEPS, RecentSteps
from megachiar.config import RunConfig
from megachiar.engine.engine import Engine
from megachiar.engine.finite_state import find_non_finite
from megachiar.engine.step_metrics import StepResult
from megachiar.errors import UserError
from megachiar.training.spikes import SpikeDetector


@dataclass(frozen=True)
class Counts:
    """What became of the steps since the last record of the metrics.

    Attributes:
        skipped: how many were left out.
        spikes: how many were spikes.
        mean_loss: mean loss of the others; None where there are none. A step's loss is the mean over its micro-batches,
            which are equally large, so that steps count alike.
    """

    skipped: int
    spikes: int
    mean_loss: float | None


class Diverged(UserError):
    """The numbers of a run are bad and stay bad, on every rank alike."""

    same_on_every_rank = True


@dataclass(frozen=True)
class BadStep:
    """A step with bad numbers.

    Attributes:
        kind: what is bad.
        reason: the bad numbers, for a message.
        action: what follows; with ``stop`` the run ends with ``error``.
        error: the end of the run; None where it goes on.
    """

    kind: Literal["not finite", "spike"]
    reason: str
    action: Literal["taken", "left out", "roll back", "stop"]
    error: Diverged | None = None


class BadSteps:
    """Judge the steps of a run, and count those that were left out and those that were spikes.

    Args:
        config: of the run.
        recent: the steps before the first one, as a checkpoint has them.
        rolled_back_to: the checkpoint to which the run went back last; None if it never did.
        rollbacks: how often it went back to it.

    Attributes:
        rollbacks: how often the run went back to the same checkpoint, up to now.
    """

    def __init__(self, config: RunConfig, recent: RecentSteps, rolled_back_to: Path | None = None, rollbacks: int = 0):
        self._config = config
        self._detector = SpikeDetector(config.reliability, recent)
        self._scales = config.precision.compute == "fp16" and config.precision.loss_scale == "dynamic"
        self._in_a_row = recent.skipped_in_a_row
        self._count_from(recent)
        self.rollbacks = rollbacks
        self._rolled_back_to = rolled_back_to

    @property
    def recent(self) -> RecentSteps:
        """Return what the next steps will be judged by, for a checkpoint."""
        counts = {
            "skipped_in_a_row": self._in_a_row,
            "skipped_since_record": self._skipped,
            "spikes_since_record": self._spikes,
            "taken_since_record": self._taken,
            "loss_since_record": self._loss,
        }
        return self._detector.recent.model_copy(update=counts)

    def accepts(self, result: StepResult) -> bool:
        """Return whether a step with finite numbers is to be taken; the engine asks before it changes anything."""
        return self._config.reliability.on_spike == "ignore" or self._detector.find(result) is None

    def judge(self, step: int, result: StepResult, at_least_scale: bool, newest: Path | None) -> BadStep | None:
        """Judge and count a step; every rank calls this method after every step.

        Args:
            step: number of the step.
            result: of the step.
            at_least_scale: whether fp16's loss scale could not be lowered any more when the step began.
            newest: the newest checkpoint of the run; None before the first.

        Returns:
            What is bad and what follows; None for a good step, and for one that only lowers fp16's loss scale.
        """
        # Where an overflow is no bad step by itself, it may still come from a loss that is a spike.
        spike = self._detector.find(result) if result.is_finite or self._overflows(result) else None
        self._detector.note(result)
        self._spikes += spike is not None
        self._skipped += result.skipped
        self._taken += not result.skipped
        self._loss += 0.0 if result.skipped else result.loss
        self._in_a_row = self._in_a_row + 1 if result.skipped else 0
        reason = _numbers(result) if spike is None else str(spike)
        kind: Literal["not finite", "spike"] = "not finite" if spike is None else "spike"
        error = self._why_stop(step, result, reason, at_least_scale, newest)
        if error is not None:
            return BadStep(kind, reason, "stop", error)
        if spike is None and (result.is_finite or self._overflows(result)):
            return None
        return self._follow_policy(step, BadStep(kind, reason, "left out" if result.skipped else "taken"), newest)

    def take_counts(self) -> Counts:
        """Return what became of the steps since the last call of this method.

        A run that goes on from a checkpoint goes on counting: each step is counted in one record of its metrics.
        """
        mean = self._loss / self._taken if self._taken else None
        counts = Counts(skipped=self._skipped, spikes=self._spikes, mean_loss=mean)
        self._count_from(NO_STEPS)
        return counts

    def roll_back(self, recent: RecentSteps) -> None:
        """Go on from a checkpoint that has ``recent``."""
        self._detector = SpikeDetector(self._config.reliability, recent)
        self._in_a_row = recent.skipped_in_a_row
        self._count_from(recent)

    def _count_from(self, recent: RecentSteps) -> None:
        """Go on counting from what the next record of the metrics tells already."""
        self._skipped, self._spikes = recent.skipped_since_record, recent.spikes_since_record
        self._taken, self._loss = recent.taken_since_record, recent.loss_since_record

    def _overflows(self, result: StepResult) -> bool:
        """Return whether only fp16's loss scale is too large: gradients are not finite under a loss that is."""
        return self._scales and math.isfinite(result.loss) and not math.isfinite(result.gradient_norm)

    def _follow_policy(self, step: int, bad: BadStep, newest: Path | None) -> BadStep:
        policy, limit = self._config.reliability.on_spike, self._config.reliability.max_rollbacks
        if policy == "stop":
            remedy = f"{_restart(newest)} with other data, a lower learning rate or reliability.on_spike: skip"
            return BadStep(bad.kind, bad.reason, "stop", Diverged(f"step {step}", bad.reason, remedy))
        if policy != "rollback" or newest is None:
            return bad
        self.rollbacks = self.rollbacks + 1 if newest == self._rolled_back_to else 1
        self._rolled_back_to = newest
        if self.rollbacks <= limit:
            return BadStep(bad.kind, bad.reason, "roll back")
        problem = f"{bad.reason}, and the run went back to one checkpoint {limit} times (reliability.max_rollbacks)"
        remedy = f"{_restart(newest)} with a higher reliability.max_rollbacks, and other data or a lower learning rate"
        return BadStep(bad.kind, bad.reason, "stop", Diverged(f"step {step}", problem, remedy))

    def _why_stop(
        self, step: int, result: StepResult, reason: str, at_least_scale: bool, newest: Path | None
    ) -> Diverged | None:
        """Return why the run cannot go on after this step; None if it can."""
        if not result.skipped:
            return None
        if at_least_scale and not math.isfinite(result.gradient_norm):
            return Diverged(
                f"step {step}",
                f"gradients overflow in fp16 at the least loss scale ({reason})",
                f"{_restart(newest)} with precision.compute: bf16 or fp32, a lower optimizer.learning_rate or a longer "
                "schedule.warmup_steps",
            )
        limit = self._config.reliability.max_skipped
        # A run shorter than the limit must not pass for finished when most of it was left out.
        is_lost = step == self._config.steps and 2 * self._in_a_row > step
        if self._in_a_row < limit and not is_lost:
            return None
        return Diverged(
            f"step {step}",
            f"is the last of {self._in_a_row} steps in a row that were left out: {reason} "
            f"(reliability.max_skipped is {limit})",
            f"{_restart(newest)} with a lower optimizer.learning_rate, a longer schedule.warmup_steps or "
            "precision.compute: fp32; where the data is bad for a while only, raise reliability.max_skipped",
        )


def check_weights_are_finite(engine: Engine, step: int, newest: Path | None) -> None:
    """Check weights and moments before they are saved; every rank calls this function.

    Raises:
        Diverged: a weight or moment is not finite on any rank. Every rank raises it, and nothing is saved.
    """
    name = find_non_finite(engine)
    if name is not None:
        raise Diverged(
            f"step {step}",
            f"{name} holds a number that is not finite: the checkpoint was not written",
            f"{_restart(newest)}; a weight that changes by itself points at a faulty device or library",
        )


def _numbers(result: StepResult) -> str:
    return f"the loss is {result.loss:g} and the gradient norm {result.gradient_norm:g}"


def _restart(newest: Path | None) -> str:
    """Return the beginning of a remedy: what the run starts from when it is started again."""
    if newest is None:
        return "no checkpoint was saved yet: start again"
    return f"the weights of {newest} are good, and the run goes on from there: start it again"
