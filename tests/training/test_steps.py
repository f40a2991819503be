"""Step N is the N-th step, counted from 1, wherever a step is named."""

from __future__ import annotations

import json

import pytest
from support import forked_python, pretrain, small_config, write_config, write_tokens

from megachiar.checkpoint.format import checkpoint_name, read_state
from megachiar.config import load_config
from megachiar.training.metrics import read_metrics
from megachiar.training.schedule import learning_rate

STEPS, BATCH = 3, 8


def test_log_metrics_checkpoints_schedule_and_inspection_count_alike(tmp_path):
    write_tokens(tmp_path / "train")
    sections = {
        "training": {"steps": STEPS, "global_batch_size": BATCH},
        "checkpoint": {"every": 1},
        "schedule": {"warmup_steps": 2},
    }
    config = small_config(tmp_path, **sections)
    del config["data"]["validation"]
    path = write_config(tmp_path / "config.yaml", config)
    (log,) = pretrain(path)
    records = {record["step"]: record for record in read_metrics(tmp_path / "run", "train")}
    assert sorted(records) == [1, 2, 3]
    for step in range(1, STEPS + 1):
        shown = forked_python("tools/inspect_dataset.py", "--config", path, "--step", str(step), "--json")
        samples = json.loads(shown.stdout)["samples"]
        assert [sample["position"] for sample in samples] == list(range((step - 1) * BATCH, step * BATCH))
        state = read_state(tmp_path / "run" / "checkpoints" / checkpoint_name(step))
        assert (state.step, state.samples) == (step, samples[-1]["position"] + 1)
        assert records[step]["samples"] == state.samples
        assert records[step]["learning_rate"] == learning_rate(load_config(path), step)
        assert f"step {step}/{STEPS}  loss {records[step]['loss']:.4f}" in log
    peak = config["optimizer"]["learning_rate"]
    assert [records[step]["learning_rate"] for step in (1, 2, 3)] == pytest.approx([peak / 2, peak, peak])
