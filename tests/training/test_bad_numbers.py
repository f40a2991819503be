"""A step with bad numbers on any rank changes nothing, under every layout and precision, and a run of them stops."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import WORKERS, pretrain, run_ranks, small_config, write_config, write_tokens

from megachiar.checkpoint.format import checkpoint_name, complete_checkpoints, read_state
from megachiar.cli.main import main
from megachiar.training.incident_record import checkpoint_to_spare
from megachiar.training.metrics import read_metrics

STEPS, BAD = 6, 3
PRECISIONS = ("fp32", "bf16", "fp16")
LAYOUTS = {f"ZeRO {stage}": [f"parallel.zero_stage={stage}"] for stage in range(4)}
LAYOUTS |= {"tp 2": ["parallel.tensor_size=2"], "pp 2": ["parallel.pipeline_size=2"]}
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3}
"""Relative difference of losses between layouts; those of 16 bits round differently."""
Case = tuple[str, str, int]
ALL = [(name, dtype, rank) for name in LAYOUTS for dtype in PRECISIONS for rank in (0, 1)]
ALL = [case for case in ALL if case[:2] not in {("ZeRO 0", "bf16"), ("ZeRO 0", "fp16")}]  # the config refuses these
FAST = [
    ("ZeRO 0", "fp32", 1),
    ("ZeRO 1", "fp32", 0),
    ("ZeRO 1", "bf16", 1),
    ("ZeRO 1", "fp16", 0),
    ("ZeRO 2", "bf16", 0),
    ("ZeRO 3", "fp32", 1),
    ("tp 2", "fp32", 1),
    ("pp 2", "fp32", 0),
]
LOSS = ("ZeRO 2", "fp32", 1)


class Runs:
    """Runs of two ranks that share a folder of data and one start of processes.

    Attributes:
        results: exit code and error of each run by its name.
        log: what rank 0 printed.
    """

    def __init__(self, folder: Path, cases: dict[str, dict]):
        self.folder = folder
        write_tokens(folder / "train")
        sections = {"training": {"steps": STEPS}, "checkpoint": {"every": 1, "keep": None}}
        config = small_config(folder, **sections)
        del config["data"]["validation"]
        for name, case in cases.items():
            case["set"].append(f"logging.folder={self.run(case.get('run', name))}")
        path = write_config(folder / "config.yaml", config)
        outputs = run_ranks(2, WORKERS / "bad_numbers_worker.py", path, json.dumps(list(cases.values())), timeout=600)
        self.log = outputs[0]
        lines = [[json.loads(line) for line in out.splitlines() if line.startswith("{")] for out in outputs]
        assert lines[0] == lines[1], "the ranks differ"
        self.results = dict(zip(cases, lines[0], strict=True))

    def run(self, name: str) -> Path:
        return self.folder / name.replace(" ", "_")

    def checkpoints(self, name: str) -> list[Path]:
        return complete_checkpoints(self.run(name) / "checkpoints")


def poison(what: str, steps: list[int], ranks: list[int], value: str = "nan") -> dict:
    return {"what": what, "steps": steps, "ranks": ranks, "value": value}


def once(cases: list[Case]) -> dict[str, dict]:
    """Return a run for each case whose gradient is bad in one step."""
    return {
        f"{name} {dtype} {rank}": {
            "set": [*LAYOUTS[name], f"precision.compute={dtype}"],
            "poison": poison("gradient", [BAD], [rank], "nan" if rank else "inf"),
        }
        for name, dtype, rank in cases
    }


def always(cases: list[Case]) -> dict[str, dict]:
    """Return a run for each case whose gradient is bad from a step on."""
    return {
        f"always {name} {dtype} {rank}": {
            "set": [*LAYOUTS[name], f"precision.compute={dtype}", "reliability.max_skipped=2"],
            "poison": poison("gradient", list(range(BAD, STEPS + 1)), [rank]),
        }
        for name, dtype, rank in cases
    }


def loss_once(cases: list[Case]) -> dict[str, dict]:
    """Return a run for each case whose loss is bad in one step, and its gradients are good."""
    return {
        f"loss {name} {dtype} {rank}": {
            "set": [*LAYOUTS[name], f"precision.compute={dtype}"],
            "poison": poison("loss", [BAD], [rank], "nan" if rank else "inf"),
        }
        for name, dtype, rank in cases
    }


LOSSES = [case for case in ALL if case[0] != "pp 2" or case[2] == 1]  # the last stage alone has a loss


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    cases = once(FAST) | always([("ZeRO 0", "fp32", 1)])
    cases["undisturbed"] = {"set": [*LAYOUTS["ZeRO 0"]], "poison": None}
    cases |= loss_once([LOSS])
    cases["muon"] = {"set": [*LAYOUTS["ZeRO 1"], "optimizer.kind=muon"], "poison": poison("gradient", [BAD], [1])}
    least = ["precision.compute=fp16", "precision.initial_loss_scale=4"]
    endless = poison("gradient", list(range(BAD, 20)), [1])
    for name, steps in (("part", BAD + 1), ("rest", 20)):
        cases[name] = {
            "set": ["reliability.max_skipped=4", f"training.steps={steps}"],
            "poison": endless,
            "run": "part",
        }
    pruned = [*LAYOUTS["ZeRO 0"], "checkpoint.keep=1"]
    cases["pruned"] = {"set": pruned, "poison": poison("gradient", [BAD], [0])}
    cases["least scale"] = {"set": least, "poison": poison("gradient", list(range(1, STEPS + 1)), [0])}
    cases["weight"] = {"set": [*LAYOUTS["ZeRO 1"]], "poison": poison("weight", [BAD], [1])}
    return Runs(tmp_path_factory.mktemp("fast"), cases)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("matrix"), once(ALL) | always(ALL) | loss_once(LOSSES))


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return all weights and moments of a checkpoint by file and name."""
    return {
        f"{file.name} {name}": tensor
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_left_out(runs: Runs, name: str) -> None:
    """Assert that the bad step changed nothing and was counted, and that the run went on."""
    assert runs.results[name] == {"code": 0, "error": ""}
    records = read_metrics(runs.run(name), "train")
    assert [record["skipped"] for record in records] == [int(step == BAD) for step in range(1, STEPS + 1)]
    before, after, later = (tensors(runs.checkpoints(name)[step - 1]) for step in (BAD - 1, BAD, BAD + 1))
    assert before and before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not all(torch.equal(after[key], later[key]) for key in after)
    state = read_state(runs.checkpoints(name)[BAD - 1])
    assert (state.step, state.optimizer_steps) == (BAD, BAD - 1)
    assert state.samples == BAD * 8, "the samples of a step that is left out are consumed"


def assert_all_finite(runs: Runs) -> None:
    for name in runs.results:
        for checkpoint in runs.checkpoints(name):
            assert all(tensor.isfinite().all() for tensor in tensors(checkpoint).values()), checkpoint


def assert_same_losses(runs: Runs, cases: list[Case]) -> None:
    """Assert that runs of the same precision have the same losses, whatever layout and rank had the bad gradient."""
    for dtype in PRECISIONS:
        names = [name for name, case in zip(once(cases), cases, strict=True) if case[1] == dtype]
        losses = [[record["loss"] for record in read_metrics(runs.run(name), "train")] for name in names]
        for name, other in zip(names, losses, strict=True):
            assert other == pytest.approx(losses[0], rel=TOLERANCE[dtype]), name


def assert_stopped(runs: Runs, name: str) -> None:
    """Assert that the run stopped at the second bad step, and that the checkpoint that it names is there."""
    result = runs.results[name]
    newest = runs.run(name) / "checkpoints" / checkpoint_name(BAD)
    assert result["code"] == 2
    assert f"step {BAD + 1}: is the last of 2 steps in a row that were left out" in result["error"]
    assert f"the weights of {newest} are good" in result["error"]
    assert runs.checkpoints(name)[-1] == newest


@pytest.mark.parametrize("name", once(FAST))
def test_a_bad_gradient_changes_nothing(fast, name):
    assert_left_out(fast, name)


def test_a_bad_gradient_changes_no_moment_of_muon(fast):
    assert_left_out(fast, "muon")
    names = [name for name in tensors(fast.checkpoints("muon")[-1]) if "momentum_buffer" in name]
    assert len(names) > 10, names


def test_a_bad_loss_with_good_gradients_changes_nothing(fast):
    (name,) = loss_once([LOSS])
    assert_left_out(fast, name)
    record = read_metrics(fast.run(name), "train")[BAD - 1]
    assert record["loss"] is None and math.isfinite(record["gradient_norm"])


def test_the_losses_of_all_layouts_stay_the_same(fast):
    assert_same_losses(fast, FAST)
    undisturbed = [record["loss"] for record in read_metrics(fast.run("undisturbed"), "train")]
    disturbed = [record["loss"] for record in read_metrics(fast.run("ZeRO 0 fp32 1"), "train")]
    assert disturbed[:BAD] == undisturbed[:BAD] and disturbed[BAD] != undisturbed[BAD]


def test_the_log_tells_the_count(fast):
    lines = [line for line in fast.log.splitlines() if line.startswith(f"step {BAD}/{STEPS}")]
    told = [line for line in lines if "  1 skipped  " in line and "grad inf" in line]
    assert len(told) == len(FAST) + 4, "all with a bad gradient: also 'always', 'muon', 'pruned' and 'least scale'"


def test_an_overflow_that_lowers_the_loss_scale_of_fp16_is_no_incident(fast):
    assert (fast.run("ZeRO 1 bf16 1") / "incidents" / f"step_{BAD:08d}" / "incident.json").is_file()
    assert not (fast.run("ZeRO 1 fp16 0") / "incidents").exists()


def test_bad_gradients_without_end_stop_the_run(fast):
    assert_stopped(fast, "always ZeRO 0 fp32 1")


def test_steps_that_were_left_out_before_a_stop_count_after_it(fast):
    """The first run ends after 2 of them; the second one goes on from there, and stops at the fourth in a row."""
    assert fast.results["part"]["code"] == 0
    saved = {path.name: read_state(path).recent.skipped_in_a_row for path in fast.checkpoints("part")}
    assert saved == {checkpoint_name(step): max(0, step + 1 - BAD) for step in range(1, BAD + 3)}
    error = fast.results["rest"]["error"]
    assert f"step {BAD + 3}: is the last of 4 steps in a row that were left out" in error


def test_the_checkpoint_before_an_incident_stays_as_long_as_the_incident(fast):
    """A replay of the incident starts from it; pruning by hand keeps it as well."""
    run = fast.run("pruned")
    names = [checkpoint_name(BAD - 1), checkpoint_name(STEPS)]
    assert [path.name for path in fast.checkpoints("pruned")] == names
    prune = ["checkpoint", "prune", str(run), "--keep", "1"]
    main(prune)
    assert [path.name for path in fast.checkpoints("pruned")] == names
    shutil.rmtree(run / "incidents")
    assert checkpoint_to_spare(run) is None
    main(prune)
    assert [path.name for path in fast.checkpoints("pruned")] == names[1:]


def test_an_overflow_at_the_least_loss_scale_stops_the_run_with_one_message(fast):
    result = fast.results["least scale"]
    assert result["code"] == 2 and "at the least loss scale" in result["error"], result
    assert "step 4:" in result["error"], "two overflows lower the scale from 4 to 2 and 1, after one of hysteresis"


def test_a_bad_weight_is_not_saved_and_named(fast):
    result = fast.results["weight"]
    newest = fast.run("weight") / "checkpoints" / checkpoint_name(BAD - 1)
    assert result["code"] == 2 and str(newest) in result["error"], result
    assert f"step {BAD}: " in result["error"] and "holds a number that is not finite" in result["error"]
    assert fast.checkpoints("weight")[-1] == newest


def test_no_checkpoint_holds_a_bad_number(fast):
    assert_all_finite(fast)


@pytest.mark.slow
def test_every_layout_and_precision(matrix):
    for name in once(ALL) | loss_once(LOSSES):
        assert_left_out(matrix, name)
    for name in always(ALL):
        assert_stopped(matrix, name)
    assert_same_losses(matrix, ALL)
    assert_all_finite(matrix)


def test_a_run_that_lost_most_of_its_steps_is_not_finished(tmp_path):
    write_tokens(tmp_path / "train")
    config = small_config(tmp_path, optimizer={"learning_rate": 1e30}, schedule={"warmup_steps": 0})
    del config["data"]["validation"]
    output = pretrain(write_config(tmp_path / "config.yaml", config), "training.steps=8", codes=(2,))[0]
    assert "no checkpoint was saved yet" in output and "7 steps in a row" in output, output
