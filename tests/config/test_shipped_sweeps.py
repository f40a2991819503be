"""``configs/sweeps``: every cell of every shipped sweep has a config, and the ablation has the paper's rungs."""

from __future__ import annotations

import pytest

from megachiar.config.shipped import shipped_sweeps
from megachiar.config.sweep import Sweep, load_sweep
from megachiar.sweeps.cells import cells_of


def load(name: str) -> Sweep:
    return load_sweep(shipped_sweeps()[f"sweeps/{name}"])


@pytest.mark.parametrize("name", shipped_sweeps())
def test_every_cell_has_a_config_and_a_test(name):
    sweep = load(name.removeprefix("sweeps/"))
    assert len(sweep.config.seeds) >= 3
    for cell in cells_of(sweep):
        config = cell.config()
        assert config.checkpoint.keep_best == "valid" and list(config.data.test) == ["test"]
        assert config.training.evaluate_every == config.checkpoint.every, "every evaluation may choose a checkpoint"
        assert config.training.steps % config.training.evaluate_every == 0


def test_the_ablation_has_the_rungs_and_the_controls():
    found = {cell.variant.name: cell.config().model for cell in cells_of(load("ablation"))}
    assert found["baseline"].kind == "baseline"
    assert (found["tau_0"].router.tau, found["tau_1"].router.tau) == (0.0, 1.0)
    kinds = {name: found[name].router.kind for name in ("threshold", "hashed", "random", "soft", "hard")}
    assert kinds == {name: name for name in kinds}
    assert found["keys_routed"].attention.keys == "routed" and found["no_gate"].meta_router.pool == "none"
    assert len(found["three_operators"].router.operators) == 3
    sources = {cell.variant.name: cell.variant.sources for cell in cells_of(load("ablation"))}
    assert sources["threshold"] == sources["hashed"] == ["baseline"] and sources["random"] == ["threshold"]


def test_small_corpora_are_calibrated_on_the_baseline_of_their_size():
    for cell in cells_of(load("corpora")):
        fraction = cell.config().data.train[0].fraction
        for source in cell.sources:
            assert source.config().data.train[0].fraction == fraction
    fractions = {cell.config().data.train[0].fraction for cell in cells_of(load("corpora"))}
    assert fractions == {0.01, 0.1, 1.0}


def test_shares_are_the_four_that_are_asked_for():
    shares = {cell.config().model.router.attention_share for cell in cells_of(load("shares")) if "random" in cell.name}
    assert shares == {0.1, 0.25, 0.5, 0.75}
