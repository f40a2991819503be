"""The draws of mixed training: pure functions of seed and group, with the asked probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import small_config

from megachiar.config.load import parse_config
from megachiar.training.mixing import Mixing


def mixing(data_size: int = 1, **changes) -> Mixing:
    task = {"kind": "language_model", "data": "x", "global_batch_size": 8}
    values = {
        "probability": 0.25,
        "group_size": 4,
        "tasks": {"a": task, "b": {**task, "weight": 3.0, "global_batch_size": 16, "loss_weight": 2.0}},
        **changes,
    }
    return Mixing(parse_config(small_config(Path("x"), mixed=values), "test"), data_size)


def test_shares_of_the_draws():
    drawn = mixing().draws(0, 100_000)
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    # Five standard deviations of a binomial share.
    assert shares[1] == pytest.approx(0.25 / 4, abs=5 * (0.0625 * 0.9375 / 1e5) ** 0.5)
    assert shares[2] == pytest.approx(0.75 / 4, abs=5 * (0.1875 * 0.8125 / 1e5) ** 0.5)


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_never_and_always(probability, share):
    assert (mixing(probability=probability).draws(0, 1000) > 0).mean() == share


def test_draws_depend_on_the_group_and_the_seeds_alone():
    whole = mixing().draws(0, 500)
    assert (np.concatenate([mixing().draws(0, 123), mixing(data_size=2).draws(123, 500)]) == whole).all()
    assert (mixing(seed=1).draws(0, 500) != whole).any()


def test_neighbouring_groups_are_independent():
    drawn = mixing(probability=0.5).draws(0, 50_000) > 0
    assert np.corrcoef(drawn[:-1], drawn[1:])[0, 1] == pytest.approx(0, abs=5 / 50_000**0.5)


@pytest.mark.parametrize("data_size", [1, 2, 4])
def test_weights_of_a_step_are_those_of_its_groups(data_size):
    """The mean over groups of (main + loss_weight * other) gives each batch's mean loss loss_weight / groups."""
    mixed = mixing(data_size)
    for first in range(0, 8 * 40, 8):
        plan = mixed.plan(range(first, first + 8))
        drawn = mixed.draws(first // 4, first // 4 + 2)
        main = [step for step in plan if step.task == 0]
        assert len(main) * 2 * data_size == 8
        for task, loss_weight, batch in ((1, 1.0, 8), (2, 2.0, 16)):
            steps = [step for step in plan if step.task == task]
            assert len(steps) * 2 * data_size == batch * (drawn == task).sum()
            # In units of the step's loss: DeepSpeed divides by the main micro-batches.
            assert sum(s.weight for s in steps) / len(main) == pytest.approx(loss_weight * (drawn == task).sum() / 2)


def test_samples_before_counts_the_draws():
    mixed = mixing()
    drawn = mixed.draws(0, 25)
    assert mixed.samples_before(100) == [8 * int((drawn == 1).sum()), 16 * int((drawn == 2).sum())]
    assert mixed.samples_before(0) == [0, 0]
