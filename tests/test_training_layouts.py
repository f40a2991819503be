"""The losses of a run do not depend on how many ranks share it, nor on the ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import run_ranks, small_config, write_config, write_tokens

STEPS, TOLERANCE = 20, 1e-6
STAGES = (0, 1, 2, 3)
WORKER = Path(__file__).with_name("layouts_worker.py")


@pytest.fixture(scope="module", params=["chiar", pytest.param("baseline", marks=pytest.mark.slow)])
def runs(request, tmp_path_factory):
    """(ranks, stage) -> recording of the run, all from the same config."""
    folder = tmp_path_factory.mktemp(request.param)
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=4)
    config = small_config(folder)
    config["model"] |= {"kind": request.param, "dropout": 0.1}
    path = write_config(folder / "config.yaml", config)
    recordings = {}
    for ranks in (1, 2, 4):
        run_ranks(ranks, WORKER, path, folder / f"ranks{ranks}", *map(str, STAGES))
        for stage in STAGES:
            recordings[ranks, stage] = dict(np.load(folder / f"ranks{ranks}" / f"stage{stage}.npz"))
    return recordings


LAYOUTS = [(ranks, stage) for ranks in (1, 2, 4) for stage in STAGES if (ranks, stage) != (1, 0)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda v: f"{v[0]}ranks-zero{v[1]}")
def test_losses_equal_those_of_one_process(runs, layout, record_property):
    single, other = runs[1, 0], runs[layout]
    assert single["loss"].shape == (STEPS,)
    flips = _flips(single, other)
    deviation = np.abs(other["loss"] / single["loss"] - 1)
    norm_deviation = np.abs(other["gradient_norm"] / single["gradient_norm"] - 1)
    record_property("flips", flips)
    record_property("largest deviation", float(deviation.max()))
    message = f"losses deviate by {deviation.max():.2e}, gradient norms {norm_deviation.max():.2e}; flips: {flips}"
    print(message)
    assert deviation.max() <= TOLERANCE, message
    assert other["evaluation"] == pytest.approx(single["evaluation"], rel=TOLERANCE), message
    assert norm_deviation.max() <= 1e-5, message


def test_the_run_learns(runs):
    loss = runs[1, 0]["loss"]
    assert loss[-5:].mean() < loss[:5].mean() - 0.3


def _flips(single: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """Tokens whose route differs, each with its distance |H - tau| in the single process."""
    different = np.argwhere(single["routes"] != other["routes"])
    return [
        f"step {step} layer {layer} token {token}: |H - tau| {single['margin'][step, layer, token]:.1e}"
        for step, layer, token in different
    ]
