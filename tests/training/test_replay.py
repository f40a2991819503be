"""A bad step leaves an incident; ``megachiar replay`` repeats it in one process and names the module that is bad."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import WORKERS, forked_python, pretrain, run_ranks, small_config, write_config, write_tokens
from torch import nn

from megachiar import __version__
from megachiar.checkpoint.format import checkpoint_name
from megachiar.config import load_config
from megachiar.data.storage.sealed_json import parse_sealed
from megachiar.training import incidents
from megachiar.training.bad_steps import BadStep
from megachiar.training.incidents import Incidents
from megachiar.training.metrics import read_metrics
from megachiar.training.module_trace import ModuleTrace

SAVED, BAD, BATCH = 4, 5, 8
WEIGHT = "layers.1.feed_forward.up.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of a run of two ranks whose weights were poisoned before the checkpoint of step 4.

    The poisoned numbers are finite, but their products are not.
    """
    folder = tmp_path_factory.mktemp("replay")
    write_tokens(folder / "train")
    config = small_config(
        folder,
        model={"dropout": 0.1},
        parallel={"zero_stage": 0},
        training={"steps": 12, "activation_checkpoint_interval": 2},
        checkpoint={"every": 2, "keep": None},
        reliability={"max_skipped": 2},
    )
    del config["data"]["validation"]
    path = write_config(folder / "config.yaml", config)
    poison = {"what": "weight", "name": WEIGHT, "steps": [SAVED], "ranks": [0, 1], "value": "3e38"}
    outputs = run_ranks(2, WORKERS / "bad_numbers_worker.py", path, json.dumps([{"set": [], "poison": poison}]))
    (result,) = [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]
    assert result["code"] == 2 and f"step {BAD + 1}: is the last of 2 steps" in result["error"], result
    return folder / "run"


def replay(run: Path, step: int) -> dict:
    done = forked_python("-m", "megachiar", "replay", run, "--step", str(step), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_each_bad_step_leaves_an_incident(run):
    folder = run / "incidents"
    assert sorted(path.name for path in folder.iterdir()) == [f"step_{step:08d}" for step in (BAD, BAD + 1)]
    first, last = (json.loads((folder / f"step_{step:08d}" / "incident.json").read_text()) for step in (BAD, BAD + 1))
    assert (first["step"], first["kind"], first["action"]) == (BAD, "not finite", "left out")
    assert last["action"] == "stop"
    assert first["result"]["gradient_norm"] is None and len(first["result"]["entropy"]) == 4
    assert first["checkpoint"] == str(run / "checkpoints" / checkpoint_name(SAVED))
    assert first["learning_rate"] == pytest.approx(0.002, rel=0.1)
    assert first["versions"]["megachiar"] == __version__ and first["versions"]["torch"] == torch.__version__
    assert [sample["sample"] for sample in first["samples"]] == list(range((BAD - 1) * BATCH, BAD * BATCH))
    sample = first["samples"][0]
    assert sample["source"].endswith("train") and sample["documents"] and sample["first_token"] >= 0
    assert load_config(folder / f"step_{BAD:08d}" / "config.yaml") == load_config(run / "config.yaml")


def test_replay_names_the_module_that_went_bad(run):
    found = replay(run, BAD)
    assert found["first_bad"]["module"] == WEIGHT.removesuffix(".weight")
    assert (found["first_bad"]["direction"], found["first_bad"]["what"]) == ("forward", "its output")
    assert found["checkpoint"] == str(run / "checkpoints" / checkpoint_name(SAVED))
    assert found["incident"] == str(run / "incidents" / f"step_{BAD:08d}")
    assert found["loss"] is None and found["gradient_norm"] is None
    first = found["first_bad"]["micro_batch"] * 2 + (BAD - 1) * BATCH
    assert found["samples"] == [first, first + 1]


def test_replay_repeats_the_steps_before_and_prints_what_it_found(run):
    done = forked_python("-m", "megachiar", "replay", run, "--step", str(BAD + 1))
    assert done.returncode == 0, done.stderr
    assert f"step {BAD}: loss nan, gradient norm inf, left out" in done.stderr
    assert f"{WEIGHT.removesuffix('.weight')}: its output is not finite" in done.stderr
    assert "layers.3" in done.stderr


def test_a_missing_checkpoint_before_an_incident_is_named(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / checkpoint_name(SAVED))
    done = forked_python("-m", "megachiar", "replay", copy, "--step", str(BAD))
    assert done.returncode == 0, done.stderr
    gone = f"{copy / 'checkpoints' / checkpoint_name(SAVED)}, the checkpoint before the incident, is gone or damaged"
    assert gone in done.stderr and f"steps 3 to {BAD}" in done.stderr


def test_a_good_step_is_repeated_as_two_ranks_took_it(run):
    """Step 3 comes after the checkpoint of step 2; dropout is on and the run recomputed activations."""
    record = read_metrics(run, "train")[2]
    found = replay(run, 3)
    assert found["first_bad"] is None and found["samples"] is None and found["incident"] is None
    assert found["loss"] == pytest.approx(record["loss"], rel=1e-6)
    assert found["gradient_norm"] == pytest.approx(record["gradient_norm"], rel=1e-5)
    assert [layer["name"] for layer in found["layers"]] == ["embedding", *(f"layers.{n}" for n in range(4)), "norm"]
    assert all(layer["output"] > 0 and layer["gradient"] > 0 for layer in found["layers"])


def test_a_step_of_captured_layers_is_repeated_module_by_module(tmp_path):
    """No module of a graph is called: the repetition runs them as they are, with static shapes as the graphs had."""
    write_tokens(tmp_path / "train")
    training = {"steps": 3, "cuda_graphs": 2}
    config = small_config(tmp_path, model={"dropout": 0.1}, training=training, checkpoint={"every": 2})
    del config["data"]["validation"]
    pretrain(write_config(tmp_path / "config.yaml", config))
    found, record = replay(tmp_path / "run", 3), read_metrics(tmp_path / "run", "train")[2]
    assert found["first_bad"] is None
    assert found["loss"] == pytest.approx(record["loss"], rel=1e-6)
    assert found["gradient_norm"] == pytest.approx(record["gradient_norm"], rel=1e-5)
    assert all(layer["output"] > 0 and layer["gradient"] > 0 for layer in found["layers"])
    replay(tmp_path / "run", 1)


def test_what_is_no_run_is_one_message(tmp_path):
    done = forked_python("-m", "megachiar", "replay", tmp_path, "--step", "3")
    assert done.returncode == 2 and "is no run folder" in done.stderr and "Traceback" not in done.stderr


class Sequence(nn.Module):
    """Two linear layers with an operation between them."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.operation, self.last = nn.Linear(2, 2), operation, nn.Linear(2, 1)

    def forward(self, x):
        return self.last(self.operation(self.first(x))).sum()


class Root(nn.Module):
    """The square root, whose gradient at 0 is infinite."""

    def forward(self, x):
        return (x * 0).sqrt()


def traced(model: nn.Module, scale: float = 1.0) -> ModuleTrace:
    with ModuleTrace(model, scale) as trace:
        for _ in range(2):
            (model(torch.ones(3, 2)) * scale).backward()
    return trace


def test_the_first_bad_gradient_is_named_in_the_order_of_the_backward_pass():
    bad = traced(Sequence(Root())).first_bad
    assert bad is not None and (bad.direction, bad.module, bad.micro_batch) == ("backward", "first", 0)
    assert bad.what == "the gradient of its output" and bad.before == "operation"


def test_a_bad_gradient_of_a_parameter_names_its_module():
    model = Sequence(nn.Identity())
    model.last.weight.register_hook(lambda gradient: gradient * math.inf)
    bad = traced(model).first_bad
    assert bad is not None and (bad.module, bad.what) == ("last", "the gradient of its weight")


def test_norms_are_over_all_micro_batches_and_without_the_scale_of_the_loss():
    model = Sequence(nn.Identity())
    trace, scaled = traced(model), traced(model, scale=1024.0)
    outputs = model.first(torch.ones(3, 2))
    assert trace.first_bad is None
    assert trace.output_norm("first") == pytest.approx(outputs.norm().item() * math.sqrt(2), rel=1e-6)
    expected = model.last.weight.norm().item() * math.sqrt(3 * 2)
    assert trace.gradient_norm("first") == pytest.approx(expected, rel=1e-6)
    assert scaled.gradient_norm("first") == pytest.approx(expected, rel=1e-6)
    assert not model.first._forward_hooks


class Tied(nn.Module):
    """One module that is called twice."""

    def __init__(self):
        super().__init__()
        self.table = nn.Linear(2, 2, bias=False)

    def forward(self, x):
        return self.table(self.table(x)).sum()


def test_the_second_call_of_a_module_is_told_apart():
    model = Tied()
    with torch.no_grad():
        model.table.weight.copy_(torch.tensor([[1e30, 0.0], [0.0, 1e30]]))
    trace = traced(model)
    assert trace.first_bad is not None and trace.first_bad.what == "its output (call 2 of the pass)"
    assert trace.output_norm("table") == pytest.approx(1e30 * math.sqrt(12), rel=1e-6)


def test_folders_are_bounded_and_the_rest_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(incidents, "MOST_FOLDERS", 3)
    monkeypatch.setattr(Incidents, "_describe", lambda *_: {"loss": math.nan})
    write_tokens(tmp_path / "train")
    config = load_config(write_config(tmp_path / "config.yaml", small_config(tmp_path)))
    written = Incidents(config, "1 process", lambda line: None)
    for step in (7, 7, 8, 9, 10):  # a rollback may meet a step twice
        written.record(step, BadStep("spike", "high", "roll back"), SimpleNamespace(), None, None)
    folder = tmp_path / "run" / "incidents"
    assert sorted(path.name for path in folder.iterdir()) == [
        "more.json",
        "step_00000007",
        "step_00000007_2",
        "step_00000008",
    ]
    assert json.loads((folder / "more.json").read_text()) == {"incidents": 2}
    record = parse_sealed((folder / "step_00000008" / "incident.json").read_bytes())
    assert record == {"loss": None, "checkpoint": None, "fingerprints": {}, "skipped_steps": []}


def test_a_disk_that_refuses_an_incident_does_not_end_the_run(tmp_path):
    write_tokens(tmp_path / "train")
    config = load_config(write_config(tmp_path / "config.yaml", small_config(tmp_path)))
    (tmp_path / "run").write_text("a file where the run folder should be")
    lines: list[str] = []
    Incidents(config, "1 process", lines.append).record(
        7, BadStep("spike", "high", "taken"), SimpleNamespace(), None, None
    )
    assert len(lines) == 1 and "the incident of step 7 was not recorded" in lines[0]
