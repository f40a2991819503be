"""A dataset and a checkpoint that an earlier version wrote are read bit for bit, and the run goes on as it did then.

``fixtures/written_by_0.1.0`` holds what 0.1.0 wrote; its ``recorded.json`` was computed by that version's own code.
"""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import yaml
from support import ROOT, pretrain

from megachiar.checkpoint.reading import open_tensors
from megachiar.config import load_config
from megachiar.inference.loading import load_for_inference
from megachiar.training.run_data import open_data

WRITTEN = ROOT / "tests" / "fixtures" / "written_by_0.1.0"
RECORDED = json.loads((WRITTEN / "recorded.json").read_text())


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A copy of the run; its paths are relative to the folder that it lies in."""
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def test_every_tensor_of_the_checkpoint_is_read_bit_for_bit(run):
    reader = open_tensors(run / "run" / "checkpoints" / "step_00000004")
    assert {name: digest(reader.whole(name).numpy()) for name in reader.names()} == RECORDED["tensors"]


def test_the_model_loads_for_inference(run):
    _, model, state = load_for_inference("run")
    assert state.step == 4
    names = {name for name in RECORDED["tensors"] if not name.endswith(("exp_avg", "exp_avg_sq"))}
    assert set(model.state_dict()) == names
    assert digest(model.state_dict()["embedding.weight"].numpy()) == RECORDED["tensors"]["embedding.weight"]


def test_samples_of_the_dataset_are_the_same_in_the_same_order(run):
    samples = open_data(load_config(run / "run.yaml", [])).training
    assert samples.sample(0).tolist() == RECORDED["first_sample"]
    assert digest(samples.batch(range(64)).astype("<i8")) == RECORDED["samples"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_run_goes_on_with_the_losses_it_had(run, ranks):
    config = yaml.safe_load((run / "run.yaml").read_text())
    config["parallel"]["tensor_size"] = ranks
    config["data"]["train"][0]["path"] = str(run / "train")
    config["data"]["tokenizer"] = str(run / "tokenizer.model")
    config["logging"]["folder"] = str(run / "run")
    (run / "here.yaml").write_text(yaml.safe_dump(config))
    output = pretrain(run / "here.yaml", ranks=ranks)[0]
    assert "resumed from" in output
    records = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    for key, name in (("losses", "loss"), ("gradient_norms", "gradient_norm")):
        values = {str(r["step"]): r[name] for r in records if r["kind"] == "train" and r["step"] > 4}
        assert values == pytest.approx(RECORDED[key], rel=1e-4)  # recorded on another CPU, perhaps
