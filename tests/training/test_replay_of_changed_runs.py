"""A replay takes config, data, checkpoint and left out steps as they were at the step, not as they are now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from support import WORKERS, forked_python, run_ranks, small_config, write_config, write_tokens

from megachiar.checkpoint.format import checkpoint_name
from megachiar.data.storage.sealed_json import parse_sealed, with_seal
from megachiar.training.metrics import read_metrics
from megachiar.training.recorded_steps import read_recorded_steps

LEFT_OUT, CHANGE, BAD = 4, 6, 11
"""The step left out in the first run; where the second and third go on; the bad step of the second run alone."""
NAN = {"what": "gradient", "ranks": [0], "value": "nan"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of a run that was continued twice from step 6, and saved every 3 steps.

    The second run has another learning rate, other data and more steps, and saved up to step 12. The third one went
    back to step 6 and has a third learning rate. In the folder ``batches`` beside it is a run whose batch is 8 samples
    up to step 3 and 4 from there on.
    """
    folder = tmp_path_factory.mktemp("changed")
    write_tokens(folder / "train")
    write_tokens(folder / "other", seed=1)
    config = small_config(
        folder, training={"steps": CHANGE}, checkpoint={"every": 3, "keep": None}, logging={"every": 5}
    )
    del config["data"]["validation"]
    path = write_config(folder / "config.yaml", config)
    other = [f"data.train=[{{path: {folder / 'other'}}}]", "data.on_change=continue", "training.steps=12"]
    batches = [f"logging.folder={folder / 'batches'}", "schedule.kind=constant"]
    smaller = ["training.steps=6", "training.global_batch_size=4", "data.on_change=continue"]
    runs = [
        {"set": [], "poison": {**NAN, "steps": [LEFT_OUT]}},
        {"set": [*other, "optimizer.learning_rate=0.004"], "poison": {**NAN, "steps": [BAD - 1, BAD]}},
        {"set": [*other, "optimizer.learning_rate=0.001", f"checkpoint.resume={CHANGE}"], "poison": None},
        *({"set": [*batches, *more], "poison": None} for more in (["training.steps=3"], smaller)),
    ]
    outputs = run_ranks(1, WORKERS / "bad_numbers_worker.py", path, json.dumps(runs))
    results = [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]
    assert [result["code"] for result in results] == [0] * len(runs), results
    return folder / "run"


def replay(run: Path, step: int, *more: str) -> CompletedProcess[str]:
    return forked_python("-m", "megachiar", "replay", run, "--step", str(step), "--json", *more)


def replayed(run: Path, step: int, *more: str) -> dict:
    done = replay(run, step, *more)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "log": done.stderr}


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder / "copy")
    return folder / "copy"


def assert_is_what_the_run_did(found: dict, run: Path, step: int) -> None:
    record = next(record for record in read_metrics(run, "train") if record["step"] == step)
    assert found["loss"] == pytest.approx(record["loss"], rel=1e-6)
    assert found["gradient_norm"] == pytest.approx(record["gradient_norm"], rel=1e-5)
    assert found["learning_rate"] == record["learning_rate"]
    assert found["recorded"]["loss"] == record["loss"] and not found["differs"]


def test_a_step_has_config_data_and_left_out_steps_of_its_time(run):
    """Step 5 comes after one that was left out, and before another learning rate and other data."""
    found = replayed(run, CHANGE - 1)
    assert found["checkpoint"] == str(run / "checkpoints" / checkpoint_name(3))
    assert found["config"] == str(run / "checkpoints" / checkpoint_name(CHANGE) / "config.yaml")
    assert f"step {LEFT_OUT}: " in found["log"] and ", left out" in found["log"]
    assert_is_what_the_run_did(found, run, CHANGE - 1)


def test_the_learning_rates_tell_the_config_where_the_next_checkpoint_is_gone(run, tmp_path):
    copy = copy_of(run, tmp_path)
    shutil.rmtree(copy / "checkpoints" / checkpoint_name(CHANGE))
    shutil.rmtree(copy / "incidents")  # metrics.jsonl alone tells of the step that was left out
    found = replayed(copy, CHANGE - 1)
    assert found["config"] == str(copy / "checkpoints" / checkpoint_name(3) / "config.yaml")
    assert_is_what_the_run_did(found, run, CHANGE - 1)


def test_a_replay_goes_through_a_change_of_the_data(run, tmp_path):
    """Steps 4 to 6 read the first data, step 7 the second; their learning rates differ."""
    copy = copy_of(run, tmp_path)
    shutil.rmtree(copy / "checkpoints" / checkpoint_name(CHANGE))
    found = replayed(copy, CHANGE + 1)
    first = next(record for record in read_metrics(run, "train") if record["step"] == 5)
    assert f"step 5: loss {first['loss']:.4f}" in found["log"]
    assert found["recorded"] is None and f"step {CHANGE + 1} has no record of its own" in found["log"]
    assert "step 5: learning rate 0.00" in found["log"] and "where the run recorded" in found["log"]


def test_a_batch_that_changed_is_that_of_the_step(run, tmp_path):
    copy = copy_of(run.parent / "batches", tmp_path)
    assert_is_what_the_run_did(replayed(copy, 5), copy, 5)
    shutil.rmtree(copy / "checkpoints" / checkpoint_name(3))
    found = replayed(copy, 3)
    assert found["config"] == str(copy / "checkpoints" / checkpoint_name(6) / "config.yaml"), "with a batch of 4"
    assert_is_what_the_run_did(found, copy, 3)
    refused = replay(copy, 5)
    assert refused.returncode == 2 and "step 1 read 8 samples and step 5 read 4" in " ".join(refused.stderr.split())


def test_a_difference_is_said_plainly(run, tmp_path):
    copy = copy_of(run, tmp_path)
    metrics = copy / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for record in records:
        record["learning_rate"] *= 2
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = forked_python("-m", "megachiar", "replay", copy, "--step", "5")
    recorded = next(record for record in records if record["step"] == 5)["learning_rate"]
    told = f"learning rate {recorded / 2:.6g} where the run recorded {recorded:.6g}"
    assert found.returncode == 0 and f"this is not what the run did: {told}" in " ".join(found.stderr.split())


def test_an_incident_of_a_branch_set_aside_is_repeated_from_its_own_checkpoint(run, tmp_path):
    found = replayed(run, BAD)
    own = run / "checkpoints" / f"{checkpoint_name(9)}.set_aside"
    assert found["checkpoint"] == str(own) and (run / "checkpoints" / checkpoint_name(9)).exists()
    recorded = parse_sealed((run / "incidents" / f"step_{BAD:08d}" / "incident.json").read_bytes())
    assert found["loss"] == pytest.approx(recorded["result"]["loss"], rel=1e-6)
    assert f"step {BAD - 1}: " in found["log"] and ", left out" in found["log"]
    assert found["differs"] and found["recorded"]["gradient_norm"] is None, "the device was at fault"

    copy = copy_of(run, tmp_path)
    shutil.rmtree(copy / "checkpoints" / own.name)
    found = replayed(copy, BAD)
    assert found["checkpoint"] == str(copy / "checkpoints" / checkpoint_name(CHANGE)), "not that of the new branch"
    assert "is gone or damaged (what is there now, the run has saved since)" in found["log"]


def test_an_incident_of_an_earlier_version_is_replayed(run, tmp_path):
    copy = copy_of(run, tmp_path)
    path = copy / "incidents" / f"step_{BAD:08d}" / "incident.json"
    record = parse_sealed(path.read_bytes())
    record = {key: value for key, value in record.items() if key not in ("fingerprints", "skipped_steps")}
    path.write_text(json.dumps(with_seal(record)))
    found = replayed(copy, BAD)
    assert found["checkpoint"] == str(copy / "checkpoints" / f"{checkpoint_name(9)}.set_aside"), (
        "its config is the same"
    )
    assert f"step {BAD - 1}: " in found["log"] and "where the run recorded" not in found["log"]
    assert "the incident does not tell which it came after" in found["log"]


def test_a_step_of_the_run_that_was_loaded_is_refused(run, tmp_path):
    config = small_config(run.parent)
    del config["data"]["validation"]
    config["logging"]["folder"] = str(tmp_path)
    config["checkpoint"] = {"load_from": str(run / "checkpoints" / checkpoint_name(3)), "load": "all"}
    write_config(tmp_path / "config.yaml", config)
    done = replay(tmp_path, 2)
    assert done.returncode == 2 and f"{tmp_path}: begins after step 3" in done.stderr


def test_data_that_has_moved_is_found_or_asked_for(run, tmp_path):
    data, moved = run.parent, tmp_path / "moved"
    moved.mkdir()
    files = list(data.glob("other.*"))
    for file in files:
        shutil.move(file, moved / file.name)
    try:
        asked = replay(run, BAD)
        assert asked.returncode == 2 and "Traceback" not in asked.stderr
        assert "--set data.train.0.path=PATH" in " ".join(asked.stderr.split())
        given = replayed(run, BAD, f"--data.train.0.path={moved / 'other'}")
        copy = copy_of(run, tmp_path)  # a run that continued with the moved data has its path in config.yaml
        config = copy / "config.yaml"
        config.write_text(config.read_text().replace(str(data / "other"), str(moved / "other")))
        assert replayed(copy, BAD)["loss"] == given["loss"]
        assert_is_what_the_run_did(replayed(copy, BAD + 1), run, BAD + 1)
        wrong = replay(run, BAD, f"--data.train.0.path={data / 'train'}")
        assert wrong.returncode == 2 and str(data / "other") in wrong.stderr
    finally:
        for file in files:
            shutil.move(moved / file.name, file)
    recorded = parse_sealed((run / "incidents" / f"step_{BAD:08d}" / "incident.json").read_bytes())
    assert given["loss"] == pytest.approx(recorded["result"]["loss"], rel=1e-6)


def test_left_out_steps_of_earlier_versions_are_told_by_counts_and_incidents(tmp_path):
    def recorded(*records: tuple[int, int], incidents: dict[int, str] | None = None):
        lines = [{"step": step, "kind": "train", "loss": 1.0, "skipped": skipped} for step, skipped in records]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        shutil.rmtree(tmp_path / "incidents", ignore_errors=True)
        for step, action in (incidents or {}).items():
            folder = tmp_path / "incidents" / f"step_{step:08d}"
            folder.mkdir(parents=True)
            data = {"seed": 0, "order": "keyed", "sources": [{"path": "a", "tokens": 9, "checksum": None}]}
            data["orders"] = [{"sequence_length": 4, "shares": [{"source": 0, "weight": 1.0}]}]
            record = {"step": step, "action": action, "data": {**data, "batches": [{"global_batch_size": 2}]}}
            (folder / "incident.json").write_text(json.dumps(record))
        steps = read_recorded_steps(tmp_path, range(6, 21))
        return set(steps.skipped), set(steps.taken), len(steps.unknown)

    early = set(range(6, 11))
    assert recorded((10, 0), (20, 0)) == (set(), set(range(6, 21)), 0)
    assert recorded((10, 0), (20, 2)) == (set(), early, 1)
    assert recorded((10, 0), (20, 2), incidents={12: "left out", 14: "taken"}) == ({12}, early, 1)
    known = {12: "left out", 14: "left out", 8: "left out"}
    assert recorded((10, 0), (20, 2), incidents=known) == ({12, 14}, {*range(6, 21)} - {12, 14}, 0)
    assert recorded((9, 0), (10, 1)) == ({10}, {6, 7, 8, 9}, 0)
