"""The 400M model takes real steps on a CPU, started as the README says, with batch size and steps overridden alone."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
from support import ROOT, process_environment, python, write_tokens

from megachiar.training.metrics import read_metrics
from megachiar.training.run_result import read_result

OVERRIDES = ["training.steps=3", "training.global_batch_size=2", "training.micro_batch_size=1"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_deepspeed_takes_three_steps_of_the_400m_model(tmp_path):
    for part, documents in (("train", 40), ("valid", 4), ("test", 4)):
        (tmp_path / "data" / "wikitext-103").mkdir(parents=True, exist_ok=True)
        write_tokens(tmp_path / "data" / "wikitext-103" / part, documents=documents, vocab_size=50257)
    for name in ("megachiar", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["deepspeed", "megachiar/pretrain.py", "--config", "configs/400m.yaml", "--set", *OVERRIDES]
    env = process_environment(PATH=f"{Path(os.sys.executable).parent}:{os.environ['PATH']}")
    del env["OMP_NUM_THREADS"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "400," in output and "parameters" in output
    losses = [json.dumps(r["loss"]) for r in read_metrics(tmp_path / "runs" / "400m", "train")]
    assert len(losses) == 1 and "step 3/3" in output  # the last step is always logged
    assert read_result(tmp_path / "runs" / "400m").test.keys() == {"test"}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(output, f"peak {peak:.1f} GiB")
    assert peak < 24


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("400m", "400,"), ("400m_baseline", "404,"), ("400m_mixed", "400,"), ("17m", "15,"), ("7b", "6,"), ("tiny", "3,")],
)
def test_dry_run_plans_every_shipped_config(name, parameters):
    done = python("-m", "megachiar.pretrain", "--config", f"configs/{name}.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "│ parameters " in line)
    assert parameters in line
    for part in ("model:", "one rank", "FLOPs a step", "activations"):
        assert part in done.stdout
