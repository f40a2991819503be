"""What of a router may change where a run goes on, and what not: a running threshold must be in the checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
from model_cases import small_model_config
from support import pretrain, small_config, write_config, write_tokens

from megachiar.checkpoint.compatibility import check_same_model
from megachiar.errors import UserError
from megachiar.training.metrics import read_metrics

STEPS = 8
LEARNED = {"kind": "learned", "target_share": 0.4}
HELD = {"tau": 0.79, "target_share": 0.4}
ALLOWED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (LEARNED, LEARNED | {"target_share": 0.7}),
    (LEARNED, LEARNED | {"explore": 0.5, "seed": 3}),
    (HELD, HELD | {"tau": None}),
    (HELD | {"anneal_steps": 5}, HELD | {"anneal_steps": 50}),
]
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"tau": 0.79}, HELD, "target_share"),
    (HELD, {"tau": 0.79}, "target_share"),
    (HELD, HELD | {"anneal_steps": 5}, "anneal_steps"),
    (HELD, LEARNED, "kind"),
]


@pytest.mark.parametrize(("before", "now"), ALLOWED)
def test_another_value_of_what_a_checkpoint_follows_is_taken(tmp_path, before, now):
    check_same_model(tmp_path, *(small_model_config(router=router) for router in (before, now)), is_own=True)


@pytest.mark.parametrize(("before", "now", "key"), REFUSED)
def test_what_the_checkpoint_does_not_hold_is_refused_by_its_key(tmp_path, before, now, key):
    with pytest.raises(UserError, match=rf"model\.router\.{key} is"):
        check_same_model(tmp_path, *(small_model_config(router=router) for router in (before, now)), is_own=True)


def test_a_run_goes_on_towards_another_share(tmp_path):
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1, documents=4)
    config = small_config(tmp_path)
    config["model"]["router"] = {"kind": "threshold", "tau": 0.79, "target_share": 0.3}
    pretrain(write_config(tmp_path / "config.yaml", config), "training.steps=30")
    (output,) = pretrain(tmp_path / "config.yaml", "training.steps=90", "model.router.target_share=0.8")
    assert "model.router.target_share was 0.3 up to here and is 0.8 from here on" in output
    shares = {r["step"]: sum(r["attention_share"][1:3]) / 2 for r in read_metrics(tmp_path / "run", "train")}
    early, late = (sum(shares[step] for step in steps) / len(steps) for steps in (range(21, 31), range(81, 91)))
    assert early == pytest.approx(0.3, abs=0.12) and late == pytest.approx(0.8, abs=0.12)
    (refused,) = pretrain(tmp_path / "config.yaml", "training.steps=91", "model.router.target_share=null", codes=(2,))
    assert "model.router.target_share is 'set' in the checkpoint" in " ".join(refused.split())


@pytest.mark.parametrize("router", [{"kind": "learned", "explore": 0.5}, {"tau": 0.79}])
def test_a_new_run_of_the_weights_anneals_anew(tmp_path, router):
    """Its first steps send all tokens to attention, though the threshold of the checkpoint lets few pass."""
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1, documents=4)
    config = small_config(tmp_path)
    config["model"]["router"] = {**router, "target_share": 0.2, "anneal_steps": 3}
    pretrain(write_config(tmp_path / "config.yaml", config), "training.steps=60")
    held = read_metrics(tmp_path / "run", "train")[-1]["attention_share"][1:3]
    assert sum(held) / 2 < 0.6
    new = ["checkpoint.load_from=" + str(tmp_path / "run"), f"training.steps={STEPS}", "optimizer.learning_rate=1e-30"]
    pretrain(tmp_path / "config.yaml", *new, f"logging.folder={tmp_path / 'anew'}", "model.router.anneal_steps=400")
    shares = [record["attention_share"][1:3] for record in read_metrics(tmp_path / "anew", "train")]
    assert shares == [[1.0, 1.0]] * STEPS
    pretrain(tmp_path / "config.yaml", *new, f"logging.folder={tmp_path / 'held'}", "model.router.anneal_steps=0")
    first = read_metrics(tmp_path / "held", "train")[0]["attention_share"][1:3]
    assert sum(first) / 2 == pytest.approx(sum(held) / 2, abs=0.15), "without annealing the threshold is taken over"


def test_weights_of_a_fixed_threshold_start_a_running_one(tmp_path):
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1, documents=4)
    config = small_config(tmp_path)
    config["model"]["router"] = {"tau": 0.79}
    pretrain(write_config(tmp_path / "config.yaml", config), "training.steps=2")
    new = [f"checkpoint.load_from={tmp_path / 'run'}", f"logging.folder={tmp_path / 'new'}", "training.steps=2"]
    pretrain(tmp_path / "config.yaml", *new, "model.router.target_share=0.4")
    assert len(read_metrics(tmp_path / "new", "train")) == 2
