"""The rule that tells a spike from noise: median and MAD of the last steps."""

from __future__ import annotations

import numpy as np
import pytest

from megachiar.checkpoint.format import RecentSteps
from megachiar.config.reliability import ReliabilityConfig
from megachiar.engine.step_metrics import StepResult
from megachiar.training.spikes import SpikeDetector

WINDOW = 16


def result(loss: float, norm: float = 1.0) -> StepResult:
    nothing: list[float] = []
    return StepResult(loss, 0.0, norm, False, False, nothing, nothing, nothing, float("nan"))


def detector(losses: list[float], norms: list[float] | None = None, **keys: float) -> SpikeDetector:
    made = SpikeDetector(ReliabilityConfig(spike_window=WINDOW, **keys), RecentSteps())
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        made.note(result(loss, norm))
    return made


def test_the_threshold_is_in_standard_deviations_of_normal_noise():
    """Of 1, 2, ..., 16 the median is 8.5 and the median distance from it 4: a standard deviation of 5.93."""
    made = detector([float(n) for n in range(1, WINDOW + 1)])
    assert made.find(result(8.5 + 5.9 * 1.4826 * 4)) is None
    spike = made.find(result(8.5 + 6.1 * 1.4826 * 4))
    assert spike is not None and spike.name == "loss"
    assert (spike.median, spike.steps, spike.sigmas) == (8.5, WINDOW, pytest.approx(6.1))


def test_a_higher_threshold_lets_more_through():
    made = detector([float(n) for n in range(1, WINDOW + 1)], spike_sigma=7.0)
    assert made.find(result(8.5 + 6.1 * 1.4826 * 4)) is None


def test_a_gradient_norm_is_compared_with_gradient_norms():
    noise = (1 + 0.1 * np.random.default_rng(0).standard_normal(WINDOW)).tolist()
    spike = detector([3.0] * WINDOW, noise).find(result(3.0, 50.0))
    assert spike is not None and spike.name == "gradient norm" and "50 is" in str(spike)


def test_a_fall_is_no_spike():
    assert detector([4.0, 4.1] * 8).find(result(0.1, 0.001)) is None


def test_nothing_is_a_spike_before_half_of_the_window():
    assert detector([3.0, 3.1] * (WINDOW // 4 - 1) + [3.0]).find(result(1e6)) is None
    assert detector([3.0, 3.1] * (WINDOW // 4)).find(result(1e6)) is not None


def test_a_spike_does_not_hide_the_next_one():
    """With mean and standard deviation, as in OLMo-core, the second one would be 2 standard deviations above."""
    made = detector([3.0, 3.1] * 8)
    for _ in range(WINDOW // 2 - 1):
        assert made.find(result(1000.0)) is not None
        made.note(result(1000.0))


def test_a_value_that_is_not_finite_is_not_compared_with():
    made = detector([3.0, 3.1] * 8)
    before = made.recent
    made.note(result(float("nan")))
    made.note(result(3.0, float("inf")))
    assert made.recent == before and len(before.losses) == WINDOW


def test_a_value_that_is_not_finite_is_no_spike_and_hides_none():
    made = detector([3.0, 3.1] * 8)
    assert made.find(result(3.0, float("inf"))) is None and made.find(result(float("nan"))) is None
    spike = made.find(result(1000.0, float("inf")))
    assert spike is not None and spike.name == "loss"


def test_losses_that_do_not_vary_have_a_least_spread():
    made = detector([4.0] * WINDOW)
    assert made.find(result(4.02)) is None, "0.5 % above"
    assert made.find(result(4.03)) is not None, "0.75 % above"


def test_a_checkpoint_restores_the_window():
    made = detector([3.0, 3.1] * 20)
    again = SpikeDetector(
        ReliabilityConfig(spike_window=WINDOW), RecentSteps.model_validate_json(made.recent.model_dump_json())
    )
    assert again.recent == made.recent
    assert again.find(result(9.0)) == made.find(result(9.0)) is not None


def test_normal_noise_has_no_spikes():
    noise = np.random.default_rng(1).standard_normal(5000)
    made = SpikeDetector(ReliabilityConfig(), RecentSteps())
    for value in noise:
        assert made.find(result(3 + 0.1 * value)) is None
        made.note(result(3 + 0.1 * value))
