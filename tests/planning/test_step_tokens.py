"""The tokens of a step against the draws that a run really makes, and the heads of classifications in the plan."""

from __future__ import annotations

from itertools import pairwise

import pytest
from support import small_config, write_config

from megachiar.config import RunConfig, load_config
from megachiar.model import build_model
from megachiar.planning.rank_plan import plan_ranks
from megachiar.planning.step_tokens import micro_batches_of_replica, step_tokens
from megachiar.training.mixing import Mixing

GROUPS = 200_000
T = 32


def load(folder, *overrides: str, **sections) -> RunConfig:
    return load_config(write_config(folder / "config.yaml", small_config(folder, **sections)), overrides)


def mixed_config(folder) -> RunConfig:
    classes = {"kind": "classification", "classes": 3, "head": "mlp"}
    tasks = {
        "classes": {**classes, "data": "examples", "global_batch_size": 8, "weight": 2.0},
        "other": {"kind": "language_model", "data": "other", "global_batch_size": 4},
    }
    mixed = {"probability": 0.3, "group_size": 4, "tasks": tasks}
    training = {"global_batch_size": 8, "micro_batch_size": 4}
    return load(folder, f"data.sequence_length={T}", training=training, mixed=mixed)


def test_a_language_model_and_a_classification(tmp_path):
    sizes = {"global_batch_size": 6, "micro_batch_size": 3}
    assert step_tokens(load(tmp_path, f"data.sequence_length={T}", training=sizes)) == (6 * T, 0)
    task = {"kind": "classification", "classes": 3}
    assert step_tokens(load(tmp_path, f"data.sequence_length={T}", training=sizes, task=task)) == (0, 6 * T)


def test_a_mixed_run_has_the_tokens_of_its_draws(tmp_path):
    config = mixed_config(tmp_path)
    drawn = Mixing(config, data_size=1).samples_before(GROUPS * 4)
    of_classes, of_other = (samples / (GROUPS / 2) for samples in drawn)  # two groups a step
    found = step_tokens(config)
    assert found.classifying == pytest.approx(of_classes * T, rel=0.02)
    assert found.predicting == pytest.approx((8 + of_other) * T, rel=0.005)
    steps = range(0, 4000 * 8, 8)
    counted = [len(Mixing(config, 1).plan(range(first, last))) for first, last in pairwise(steps)]
    assert micro_batches_of_replica(config, 1) == pytest.approx(sum(counted) / len(counted), rel=0.03)


def test_the_plan_has_the_parameters_of_the_heads(tmp_path):
    config = mixed_config(tmp_path)
    model = build_model(config.model, seed=0, device="meta", heads=config.heads)
    (plan,) = plan_ranks(config, 1)
    assert plan.parameters == model.parameter_count()
    assert plan.parameters > build_model(config.model, seed=0, device="meta").parameter_count()
