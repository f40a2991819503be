"""The vector of a step's numbers: what is put in comes out under its name, from one rank or from several stages."""

from __future__ import annotations

import pytest
import torch

from megachiar.engine.step_metrics import (
    STATISTICS,
    StepResult,
    TaskResult,
    flatten_auxiliary,
    flatten_forward,
    flatten_rank,
    flatten_step,
    unflatten_step,
)
from megachiar.model import RoutingStatistics

LAYERS = 3
STATISTICS_OF_LAYERS = RoutingStatistics(
    attention_share=torch.tensor([0.0, 0.25, 1.0]),
    rbf_share=torch.tensor([0.5, 0.125, 0.0]),
    entropy=torch.tensor([2.0, 0.75, 3.0]),
    gate=torch.tensor([0.375, 5.0, 6.0]),
    real_share=torch.ones(3),
)
NOTHING_MEASURED = torch.tensor([*[0.0] * (2 + (len(STATISTICS) - 1) * LAYERS), *[1.0] * LAYERS], dtype=torch.float64)
"""A vector of zeros without padding."""
NONE = torch.zeros(0, dtype=torch.float64)
CPU = torch.device("cpu")


def measured(forward: torch.Tensor, auxiliary: torch.Tensor = NONE, norm: torch.Tensor | float = 7.0) -> list[float]:
    """Return what a rank reads from its device."""
    return flatten_rank(forward, auxiliary, values=NONE, gradient_norm=norm).tolist()


EXPECTED = StepResult(
    loss=4.5,
    regulariser=-0.5,
    gradient_norm=7.0,
    skipped=False,
    stop=True,
    attention_share=[0.0, 0.25, 1.0],
    rbf_share=[0.5, 0.125, 0.0],
    entropy=[2.0, 0.75, 3.0],
    gate=0.375,
)


def test_each_number_comes_back_under_its_name():
    forward = flatten_forward(torch.tensor(4.5), torch.tensor(-0.5), STATISTICS_OF_LAYERS.summable())
    assert forward.dtype == torch.float64 and forward.shape == (2 + len(STATISTICS) * LAYERS,)
    for norm in (7.0, torch.tensor(7.0), torch.tensor([7.0])):
        numbers = measured(forward, norm=norm)
        assert unflatten_step(flatten_step(numbers, skipped=False, stop=True, is_last_stage=True), LAYERS) == EXPECTED


def test_two_stages_add_up_to_the_whole_model():
    """The first stage has layers 0 and 1, the second has layer 2 and the loss; both know the gradient norm."""
    first, second = (STATISTICS_OF_LAYERS.summable() for _ in range(2))
    first[:, 2], second[:, :2] = 0, 0
    forwards = [
        flatten_forward(torch.zeros(()), torch.tensor(-0.25), first),
        flatten_forward(torch.tensor(4.5), torch.tensor(-0.25), second),
    ]
    vectors = [
        flatten_step(measured(forward), skipped=False, stop=stage == 0, is_last_stage=stage == 1)
        for stage, forward in enumerate(forwards)
    ]
    assert unflatten_step([sum(values) for values in zip(*vectors, strict=True)], LAYERS) == EXPECTED


def test_an_overflow_on_any_rank_is_a_skipped_step():
    for norm in (float("inf"), float("nan"), -1.0, torch.tensor(-1.0)):
        numbers = measured(NOTHING_MEASURED, norm=norm)
        for is_last_stage in (True, False):
            vector = flatten_step(numbers, skipped=True, stop=False, is_last_stage=is_last_stage)
            result = unflatten_step(vector, LAYERS)
            assert result.skipped and not result.stop and result.gradient_norm == float("inf")


def test_auxiliary_tasks_are_averaged_over_stages_replicas_and_their_micro_batches():
    """Two replicas of two stages: the first stage knows gates, the second losses. Task b has no batch in the step."""

    def scalars(*values: float) -> list[torch.Tensor]:
        return [torch.tensor(value) for value in values]

    first = [flatten_auxiliary([[], []], [scalars(*gates), []], CPU) for gates in ((0.25, 0.75), (0.5, 0.5))]
    second = [flatten_auxiliary([scalars(*losses), []], [[], []], CPU) for losses in ((1.0, 2.0), (3.0, 6.0))]
    vectors = [
        flatten_step(measured(NOTHING_MEASURED, values), skipped=False, stop=False, is_last_stage=is_last_stage)
        for is_last_stage, stages in ((False, first), (True, second))
        for values in stages
    ]
    mean = [sum(values) / 2 for values in zip(*vectors, strict=True)]
    result = unflatten_step(mean, LAYERS, ["a", "b"])
    assert result.tasks == {"a": TaskResult(loss=3.0, gate=0.5, batches=2.0)}
    assert result.gradient_norm == 7.0


def test_a_loss_of_a_task_that_is_not_finite_is_a_skipped_step():
    numbers = measured(NOTHING_MEASURED, torch.tensor([float("nan"), 0.5, 1.0], dtype=torch.float64))
    assert unflatten_step(flatten_step(numbers, skipped=False, stop=False, is_last_stage=True), LAYERS, ["a"]).skipped


def test_statistics_are_means_over_real_rows():
    """Two micro-batches: all rows of the first are real, and a quarter of the second's."""
    second = RoutingStatistics(*(2 * value for value in STATISTICS_OF_LAYERS[:-1]), real_share=torch.full((3,), 0.25))
    forwards = [
        flatten_forward(torch.ones(()), torch.zeros(()), each.summable()) for each in (STATISTICS_OF_LAYERS, second)
    ]
    numbers = measured(torch.stack(forwards).mean(0))
    vector = flatten_step(numbers, skipped=False, stop=False, is_last_stage=True)
    result = unflatten_step(vector, LAYERS)
    for name in ("attention_share", "rbf_share", "entropy"):
        expected = [value * (1 + 2 * 0.25) / 1.25 for value in getattr(EXPECTED, name)]
        assert getattr(result, name) == pytest.approx(expected)
    assert result.gate == pytest.approx(EXPECTED.gate * 1.2)
