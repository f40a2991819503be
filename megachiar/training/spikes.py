"""Tell a spike of the loss or the gradient norm from the noise of the steps before it.

    z = (value - median) / max(1.4826 * MAD, median / 1000)        a spike: z > reliability.spike_sigma

Median and MAD (the median distance from the median) are those of the last ``reliability.spike_window`` steps whose
numbers were finite. 1.4826 MAD is the standard deviation of normal noise.

The rule is that of OLMo-core's ``SkipStepOptimizer`` (6 sigma over 128 steps, from half of them on), with two changes.
It takes mean and standard deviation, into which every spike enters: after one spike the next one is no spike any more.
Median and MAD keep their values as long as fewer than half of the steps are spikes. And it takes a fall for a spike
like a rise; here a falling loss is what a run is for. The second term is for losses that hardly vary.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np

from megachiar.checkpoint.format import RecentSteps
from megachiar.config.reliability import ReliabilityConfig
from megachiar.engine.step_metrics import StepResult

MAD_OF_NORMAL_NOISE = 1.4826
LEAST_SPREAD = 1e-3


class Spike(NamedTuple):
    """A value that is far above those of the steps before it.

    Attributes:
        name: ``loss`` or ``gradient norm``.
        value: of this step.
        median: of the steps before.
        sigmas: standard deviations between the two.
        steps: number of steps before that it was compared with.
    """

    name: str
    value: float
    median: float
    sigmas: float
    steps: int

    def __str__(self) -> str:
        return (
            f"the {self.name} {self.value:.4g} is {self.sigmas:.1f} standard deviations above {self.median:.4g}, "
            f"the median of the last {self.steps} steps"
        )


class SpikeDetector:
    """Compare each step with the steps before it.

    Args:
        config: window and threshold.
        recent: the steps before the first one, as a checkpoint has them.
    """

    def __init__(self, config: ReliabilityConfig, recent: RecentSteps):
        self._least_steps = config.spike_window // 2
        self._sigma = config.spike_sigma
        self._losses = deque(recent.losses, config.spike_window)
        self._norms = deque(recent.gradient_norms, config.spike_window)

    @property
    def recent(self) -> RecentSteps:
        """Return the steps that the next one will be compared with."""
        return RecentSteps(losses=tuple(self._losses), gradient_norms=tuple(self._norms))

    def find(self, result: StepResult) -> Spike | None:
        """Return the spike of a step, the larger one of loss and gradient norm; None without one.

        A number that is not finite is no spike.
        """
        spikes = [
            self._compare("loss", result.loss, self._losses),
            self._compare("gradient norm", result.gradient_norm, self._norms),
        ]
        return max((spike for spike in spikes if spike is not None), key=lambda spike: spike.sigmas, default=None)

    def note(self, result: StepResult) -> None:
        """Let the steps after this one be compared with it; a step whose numbers are not finite is left out."""
        if math.isfinite(result.loss) and math.isfinite(result.gradient_norm):
            self._losses.append(result.loss)
            self._norms.append(result.gradient_norm)

    def _compare(self, name: str, value: float, before: deque[float]) -> Spike | None:
        if len(before) < self._least_steps or not math.isfinite(value):
            return None
        median = float(np.median(before))
        distance = float(np.median(np.abs(np.array(before) - median)))
        spread = max(MAD_OF_NORMAL_NOISE * distance, LEAST_SPREAD * abs(median))
        sigmas = (value - median) / spread if spread else math.copysign(math.inf, value - median)
        return Spike(name, value, median, sigmas, len(before)) if sigmas > self._sigma else None
