"""The gate before the optimizer: weights and moments change only where all ranks agree that a step is good.

    micro-batches -> gradients -> DeepSpeed: reduce, norm, clip -> step of the first group ----> of the others
                                       |                            |
                                 not finite: it is never called     the ranks agree: step, or leave it out

DeepSpeed decides by ZeRO stage and precision whether it skips a step whose gradients are not finite, and never looks at
the loss. Under every stage, the optimizer that we built is what changes weights, moments and the count of steps. It is
therefore the one place where a step can be left out alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megachiar.engine.step_metrics import StepResult


class StepGate:
    """Replace an optimizer's ``step`` by one that first lets the ranks agree.

    DeepSpeed calls ``step`` once under ZeRO 0, and once for each group of parameters under ZeRO 1 to 3.

    Args:
        optimizer: what we built, before DeepSpeed takes it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._step: Callable[..., Any] = optimizer.step
        self._agree: Callable[[bool], StepResult] | None = None
        self._result: StepResult | None = None
        vars(optimizer)["step"] = self._step_if_good

    def begin(self, agree: Callable[[bool], StepResult]) -> None:
        """Begin an optimizer step.

        Args:
            agree: called once in the step, on every rank; returns what the ranks agree on. Its argument says whether
                DeepSpeed has skipped the step on this rank.
        """
        self._agree, self._result = agree, None

    def finish(self) -> StepResult:
        """Return the result of the step, after DeepSpeed has taken or skipped it."""
        assert self._agree is not None, "no step was begun"
        if self._result is None:  # DeepSpeed skipped the step: the optimizer was never asked
            self._result = self._agree(True)
        return self._result

    def _step_if_good(self, *arguments: Any, **keywords: Any) -> Any:
        """Step as the optimizer does, unless the ranks agree that the step is to be left out."""
        assert self._agree is not None, "no step was begun"
        if self._result is None:
            self._result = self._agree(False)
        return None if self._result.skipped else self._step(*arguments, **keywords)
