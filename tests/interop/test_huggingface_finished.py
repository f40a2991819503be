"""``checkpoint.export_hf``: a finished run exports the checkpoint that it names, once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from exported_runs import library
from support import pretrain, small_config, write_config, write_tokens

from megachiar.checkpoint.format import complete_checkpoints, read_state
from megachiar.config.errors import ConfigError
from megachiar.config.load import parse_with_overrides

library()


def run_config(folder: Path, name: str, **checkpoint: Any) -> dict[str, Any]:
    """Return a config whose learning rate is so large that the first steps are the best."""
    config = small_config(folder, optimizer={"learning_rate": 3.0}, schedule={"warmup_steps": 2})
    config["training"] |= {"steps": 4, "evaluate_every": 1, "global_batch_size": 4}
    config["checkpoint"] = {"every": 1, "keep_best": "valid", "keep": None, **checkpoint}
    config["logging"]["folder"] = str(folder / name)
    return config


def exported_step(run: Path) -> int:
    return json.loads((run / "hf" / "config.json").read_text())["megachiar"]["step"]


def test_a_finished_run_exports_what_the_key_names(tmp_path):
    for part, seed in (("train", 0), ("valid", 1)):
        write_tokens(tmp_path / part, seed=seed)
    for name in ("last", "best", "null"):
        config = run_config(tmp_path, name, export_hf=None if name == "null" else name)
        pretrain(write_config(tmp_path / f"{name}.yaml", config), ranks=2 if name == "best" else 1)
    losses = {
        state.step: state.validation["valid"]
        for state in map(read_state, complete_checkpoints(tmp_path / "best" / "checkpoints"))
    }
    best = min(losses, key=losses.__getitem__)
    assert best < 4, "the test needs a run that gets worse"
    assert exported_step(tmp_path / "best") == best and exported_step(tmp_path / "last") == 4
    assert not (tmp_path / "null" / "hf").exists()
    # A finished run that is started again makes up for an export that is missing, and for none that is there.
    assert "exported" not in pretrain(tmp_path / "best.yaml")[0]
    shutil.rmtree(tmp_path / "best" / "hf")
    assert f"exported step {best}" in pretrain(tmp_path / "best.yaml")[0]
    pretrain(tmp_path / "last.yaml", "training.steps=5")
    assert exported_step(tmp_path / "last") == 5


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"checkpoint": {"export_hf": "best"}}, "is best without checkpoint.keep_best"),
        (
            {"checkpoint": {"export_hf": "last"}, "meta_router": {"pool": "batch"}},
            "is last, but model.meta_router.pool is batch",
        ),
    ],
)
def test_a_key_that_asks_for_the_impossible_is_refused_at_once(sections, message, tmp_path):
    config = small_config(tmp_path)
    config["model"]["meta_router"] = sections.get("meta_router", {})
    config["checkpoint"] = sections["checkpoint"]
    with pytest.raises(ConfigError, match=message):
        parse_with_overrides(config, (), "test")
