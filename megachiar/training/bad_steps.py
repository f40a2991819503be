"""Count the steps that were left out, and stop a run that cannot go on."""

from __future__ import annotations

import math
from pathlib import Path

from megachiar.config import RunConfig
from megachiar.engine.engine import Engine
from megachiar.engine.finite_state import find_non_finite
from megachiar.engine.step_metrics import StepResult
from megachiar.errors import UserError


class Diverged(UserError):
    """The numbers of a run are bad and stay bad, on every rank alike."""

    same_on_every_rank = True


class SkippedSteps:
    """Count the steps that were left out, and stop the run where there are too many in a row.

    Args:
        config: of the run.
    """

    def __init__(self, config: RunConfig):
        self._config = config
        self._in_a_row = 0
        self._since_record = 0

    def note(self, step: int, result: StepResult, at_least_scale: bool, newest: Path | None) -> None:
        """Count ``step``; every rank calls this method after every step.

        Args:
            step: number of the step.
            result: of the step.
            at_least_scale: whether fp16's loss scale could not be lowered any more when the step began.
            newest: the newest checkpoint of the run; None before the first.

        Raises:
            Diverged: too many steps in a row were left out, or gradients overflow at the least loss scale.
        """
        if not result.skipped:
            self._in_a_row = 0
            return
        self._since_record += 1
        self._in_a_row += 1
        if at_least_scale and not math.isfinite(result.gradient_norm):
            raise Diverged(
                f"step {step}",
                f"gradients overflow in fp16 at the least loss scale ({_numbers(result)})",
                f"{_restart(newest)} with precision.compute: bf16 or fp32, a lower optimizer.learning_rate or a longer "
                "schedule.warmup_steps",
            )
        limit = self._config.reliability.max_skipped
        # A run shorter than the limit must not pass for finished when most of it was left out.
        is_lost = step == self._config.steps and 2 * self._in_a_row > step
        if self._in_a_row >= limit or is_lost:
            raise Diverged(
                f"step {step}",
                f"is the last of {self._in_a_row} steps in a row that were left out, {_numbers(result)} "
                f"(reliability.max_skipped is {limit})",
                f"{_restart(newest)} with a lower optimizer.learning_rate, a longer schedule.warmup_steps or "
                "precision.compute: fp32; where the data is bad for a while only, raise reliability.max_skipped",
            )

    def take_count(self) -> int:
        """Return how many steps were left out since the last call of this method."""
        count, self._since_record = self._since_record, 0
        return count


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
