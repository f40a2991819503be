"""The vector of a step's numbers: what is put in comes out under its name, from one rank or from several stages."""

from __future__ import annotations

import pytest
import torch

from megachiar.engine.step_metrics import (
    STATISTICS,
    RankMetrics,
    StepResult,
    TaskResult,
    flatten_auxiliary,
    flatten_forward,
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
NOTHING_MEASURED = [*[0.0] * (2 + (len(STATISTICS) - 1) * LAYERS), *[1.0] * LAYERS]
"""A vector of zeros without padding."""

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
    metrics = RankMetrics(forward=forward.tolist(), auxiliary=[], gradient_norm=7.0)
    assert unflatten_step(flatten_step(metrics, skipped=False, stop=True, is_last_stage=True), LAYERS) == EXPECTED


def test_two_stages_add_up_to_the_whole_model():
    """The first stage has layers 0 and 1, the second has layer 2 and the loss; both know the gradient norm."""
    first, second = (STATISTICS_OF_LAYERS.summable() for _ in range(2))
    first[:, 2], second[:, :2] = 0, 0
    forwards = [
        flatten_forward(torch.zeros(()), torch.tensor(-0.25), first),
        flatten_forward(torch.tensor(4.5), torch.tensor(-0.25), second),
    ]
    vectors = [
        flatten_step(RankMetrics(forward.tolist(), [], 7.0), skipped=False, stop=stage == 0, is_last_stage=stage == 1)
        for stage, forward in enumerate(forwards)
    ]
    assert unflatten_step([sum(values) for values in zip(*vectors, strict=True)], LAYERS) == EXPECTED


def test_an_overflow_on_any_rank_is_a_skipped_step():
    metrics = RankMetrics(forward=NOTHING_MEASURED, auxiliary=[], gradient_norm=float("inf"))
    result = unflatten_step(flatten_step(metrics, skipped=True, stop=False, is_last_stage=True), LAYERS)
    assert result.skipped and not result.stop and result.gradient_norm == float("inf")


def test_auxiliary_tasks_are_averaged_over_stages_replicas_and_their_micro_batches():
    """Two replicas of two stages: the first stage knows gates, the second losses. Task b has no batch in the step."""

    def scalars(*values: float) -> list[torch.Tensor]:
        return [torch.tensor(value) for value in values]

    first = [flatten_auxiliary([[], []], [scalars(*gates), []]) for gates in ((0.25, 0.75), (0.5, 0.5))]
    second = [flatten_auxiliary([scalars(*losses), []], [[], []]) for losses in ((1.0, 2.0), (3.0, 6.0))]
    vectors = [
        flatten_step(
            RankMetrics(NOTHING_MEASURED, values, 7.0),
            skipped=False,
            stop=False,
            is_last_stage=values in second,
        )
        for values in (*first, *second)
    ]
    mean = [sum(values) / 2 for values in zip(*vectors, strict=True)]
    result = unflatten_step(mean, LAYERS, ["a", "b"])
    assert result.tasks == {"a": TaskResult(loss=3.0, gate=0.5, batches=2.0)}
    assert result.gradient_norm == 7.0


def test_a_loss_of_a_task_that_is_not_finite_is_a_skipped_step():
    forward = NOTHING_MEASURED
    metrics = RankMetrics(forward, [float("nan"), 0.5, 1.0], 7.0)
    assert unflatten_step(flatten_step(metrics, skipped=False, stop=False, is_last_stage=True), LAYERS, ["a"]).skipped


def test_statistics_are_means_over_real_rows():
    """Two micro-batches: all rows of the first are real, and a quarter of the second's."""
    second = RoutingStatistics(*(2 * value for value in STATISTICS_OF_LAYERS[:-1]), real_share=torch.full((3,), 0.25))
    forwards = [
        flatten_forward(torch.ones(()), torch.zeros(()), each.summable()) for each in (STATISTICS_OF_LAYERS, second)
    ]
    vector = flatten_step(
        RankMetrics(torch.stack(forwards).mean(0).tolist(), [], 7.0), skipped=False, stop=False, is_last_stage=True
    )
    result = unflatten_step(vector, LAYERS)
    for name in ("attention_share", "rbf_share", "entropy"):
        expected = [value * (1 + 2 * 0.25) / 1.25 for value in getattr(EXPECTED, name)]
        assert getattr(result, name) == pytest.approx(expected)
    assert result.gate == pytest.approx(EXPECTED.gate * 1.2)
