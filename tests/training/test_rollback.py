"""What a run does with samples that make its loss a spike, or not finite: ignore, skip, roll back, stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import WORKERS, checkpoint_tensors, run_ranks, small_config, write_config, write_tokens

from megachiar.checkpoint.format import checkpoint_name, complete_checkpoints, fingerprint_of, read_state
from megachiar.config import load_config
from megachiar.errors import EXIT_STOPPED, UserError
from megachiar.training.continuation import Continuation, continue_run
from megachiar.training.metrics import read_metrics
from megachiar.training.rollback_record import RollbackRecord, read_rollback, rollback_path, write_rollback
from megachiar.training.run_data import open_at_step, open_data
from megachiar.training.start import Start

STEPS, SAVED, BATCH = 16, 8, 8
BAD_STEPS = (11, 12)
BAD = range((BAD_STEPS[0] - 1) * BATCH, BAD_STEPS[1] * BATCH)
"""Positions of the samples of the bad steps, of which one in each step is poisoned."""
POISON = 63
TWO_RANKS_DROPOUT = {"model": {"dropout": 0.1}, "schedule": {"decay_steps": STEPS}}
SPIKE = {"what": "token", "token": POISON, "value": "1000"}
NAN = SPIKE | {"value": "nan"}


class Runs:
    """Runs of two ranks over data with a poisoned range.

    Attributes:
        results: exit code and error of each run by its name.
        log: what rank 0 printed, in one line.
    """

    def __init__(self, folder: Path, cases: dict[str, dict]):
        self.folder = folder
        write_tokens(folder / "train", documents=80, vocab_size=60)
        config = small_config(
            folder,
            training={"steps": STEPS},
            checkpoint={"every": 4, "keep": None},
            reliability={"spike_window": 8, "spike_sigma": 30},
            **TWO_RANKS_DROPOUT,
        )
        del config["data"]["validation"]
        self.path = write_config(folder / "config.yaml", config)
        poison(self.path, [BAD[3], BAD[-2]])
        for name, case in cases.items():
            case["set"].append(f"logging.folder={self.run(case.get('run', name))}")
        arguments = [WORKERS / "bad_numbers_worker.py", self.path, json.dumps(list(cases.values()))]
        outputs = run_ranks(2, *arguments, timeout=600)
        self.log = " ".join(outputs[0].split())
        lines = [[json.loads(line) for line in out.splitlines() if line.startswith("{")] for out in outputs]
        assert lines[0] == lines[1], "the ranks differ"
        self.results = dict(zip(cases, lines[0], strict=True))

    def run(self, name: str) -> Path:
        return self.folder / name.replace(" ", "_")

    def checkpoint(self, name: str, step: int = STEPS) -> Path:
        return self.run(name) / "checkpoints" / checkpoint_name(step)

    def train(self, name: str) -> list[dict]:
        return read_metrics(self.run(name), "train")


def poison(config_path: Path, positions: list[int]) -> None:
    """Write the poison into one token of each of these samples of the run."""
    stream = open_data(load_config(config_path)).training
    tokens = [location.token for location in stream.locate(positions)]
    path = Path(str(stream.sources[0].prefix) + ".bin")
    del stream
    ids = np.fromfile(path, np.uint16)
    assert POISON not in ids
    ids[np.array(tokens) + 5] = POISON
    ids.tofile(path)


BACK = "reliability.on_spike=rollback"
LEFT_OUT = [BAD.start, BAD.stop]


def pair(name: str, value: dict, *overrides: str) -> dict[str, dict]:
    """Return a run that rolls back, and one of the same layout that never has the bad samples."""
    return {
        f"rollback {name}": {"set": [BACK, *overrides], "poison": value},
        f"without {name}": {"set": [*overrides], "poison": value, "leave_out": LEFT_OUT},
    }


def rarely_logged() -> dict[str, dict]:
    """Return runs whose metrics have one record, and whose first checkpoint comes after the first bad step.

    One rolls back at the second bad step, one is told to stop in that step as well; a third one, which leaves out both
    steps, is told to stop after them.
    """
    rare = ["parallel.zero_stage=0", "logging.every=100", f"checkpoint.every={BAD_STEPS[0]}"]

    def case(policy: str, **more: Any) -> dict[str, Any]:
        return {"set": [f"reliability.on_spike={policy}", *rare], "poison": SPIKE, **more}

    return {
        "back": case("rollback"),
        "back stopped": case("rollback", stop={"step": BAD_STEPS[1], "rollbacks": 0}),
        "back resumed": case("rollback", run="back stopped"),
        "skip stopped": case("skip", stop={"step": BAD_STEPS[1] + 1, "rollbacks": 0}),
        "skip resumed": case("skip", run="skip stopped"),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    bf16, zero_3, zero_0 = "precision.compute=bf16", "parallel.zero_stage=3", "parallel.zero_stage=0"
    cases = pair("spike", SPIKE, bf16) | pair("nan", NAN, zero_3)
    cases["stopped"] = {"set": [BACK, zero_3, "training.steps=12"], "poison": NAN}
    cases |= rarely_logged()
    cases["limit"] = {"set": [BACK, "reliability.max_rollbacks=1", zero_0], "poison": SPIKE}
    cases["skip"] = {"set": ["reliability.on_spike=skip", zero_0], "poison": SPIKE}
    cases["ignore"] = {"set": [zero_0], "poison": SPIKE}
    cases["stop"] = {"set": ["reliability.on_spike=stop", zero_0], "poison": SPIKE}
    return Runs(tmp_path_factory.mktemp("rollback"), cases)


LAYOUTS = {
    "tp 2": ["parallel.tensor_size=2"],
    "pp 2": ["parallel.pipeline_size=2"],
    "pp 2 bf16": ["parallel.pipeline_size=2", "precision.compute=bf16"],
    "ZeRO 2 fp16": ["parallel.zero_stage=2", "precision.compute=fp16", "precision.loss_scale_window=4"],
    "ZeRO 3 offload bf16": ["parallel.zero_stage=3", "parallel.offload_optimizer=true", "precision.compute=bf16"],
}


@pytest.mark.slow
def test_every_layout_rolls_back(tmp_path):
    cases: dict[str, dict] = {}
    for name, overrides in LAYOUTS.items():
        cases |= pair(name, SPIKE, *overrides)
    runs = Runs(tmp_path, cases)
    for name in LAYOUTS:
        assert runs.results[f"rollback {name}"] == {"code": 0, "error": ""}
        assert len(read_metrics(runs.run(f"rollback {name}"), "rollback")) == len(BAD_STEPS)
        assert_same_end(runs, f"rollback {name}", f"without {name}")


def assert_same_end(runs: Runs, name: str, other: str) -> None:
    """Assert that two runs have the same losses and, bit for bit, the same last weights and moments."""
    keys = ("step", "loss", "gradient_norm", "samples", "tokens", "skipped", "spikes")
    ours, theirs = ([[record[key] for key in keys] for record in runs.train(n)] for n in (name, other))
    assert len(ours) == STEPS and ours == theirs
    files = [file.name for file in runs.checkpoint(name).glob("*.safetensors")]
    assert files
    for file in files:
        one, two = load_file(runs.checkpoint(name) / file), load_file(runs.checkpoint(other) / file)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert read_state(runs.checkpoint(name)).recent == read_state(runs.checkpoint(other)).recent


@pytest.mark.parametrize("what", ["spike", "nan"])
def test_a_rolled_back_run_is_one_that_never_had_the_samples(runs, what):
    assert runs.results[f"rollback {what}"] == {"code": 0, "error": ""}
    assert_same_end(runs, f"rollback {what}", f"without {what}")
    rollbacks = read_metrics(runs.run(f"rollback {what}"), "rollback")
    assert [(r["step"], r["from_step"]) for r in rollbacks] == [(SAVED, BAD_STEPS[0])] * 2
    with_rollback, without = (runs.train(f"{name} {what}") for name in ("rollback", "without"))
    elapsed = [record["elapsed_seconds"] for record in with_rollback]
    assert elapsed == sorted(elapsed), "time that a rollback lost is spent"
    assert with_rollback[-1]["flops"] > 1.2 * without[-1]["flops"], "and so are the FLOPs of the steps taken twice"
    assert [record["mean_loss"] for record in with_rollback] == [record["mean_loss"] for record in without]


def test_the_history_records_what_was_left_out(runs):
    left_out = ((BAD.start, BAD.stop),)
    assert read_state(runs.checkpoint("rollback spike", SAVED)).data.orders[-1].left_out == ()
    assert read_state(runs.checkpoint("rollback spike", 12)).data.orders[-1].left_out == left_out
    assert read_state(runs.checkpoint("rollback spike")).data.orders[-1].left_out == left_out


def test_inspection_shows_the_samples_that_were_read(runs):
    config = load_config(runs.path, [f"logging.folder={runs.run('rollback spike')}"])
    _, stream, positions = open_at_step(config, BAD_STEPS[0])
    assert positions == range(80, 88)
    original = open_data(load_config(runs.path)).training
    assert (stream.batch(positions) == original.batch(range(96, 104))).all()
    assert POISON not in stream.batch(range(STEPS * BATCH))


def test_a_stopped_run_goes_on_without_the_samples(runs):
    """The checkpoint of step 12 was saved after the rollbacks."""
    case = {"set": ["parallel.zero_stage=3", f"logging.folder={runs.run('stopped')}"], "poison": NAN}
    run_ranks(2, WORKERS / "bad_numbers_worker.py", runs.path, json.dumps([case]))
    assert_same_end(runs, "stopped", "without nan")


def test_a_stop_in_a_bad_step_does_not_bring_its_samples_back(runs):
    assert runs.results["back stopped"]["code"] == EXIT_STOPPED
    assert f"back to {runs.checkpoint('back stopped', BAD_STEPS[0])}, without the samples of step 12" in runs.log
    assert f"stopped by a signal (SIGTERM) after step {BAD_STEPS[0]}, saved" in runs.log
    for name in ("back", "back stopped"):
        assert read_state(runs.checkpoint(name)).data.orders[-1].left_out == ((BAD.stop - BATCH, BAD.stop),)
        assert [record["from_step"] for record in read_metrics(runs.run(name), "rollback")] == [BAD_STEPS[1]]
    one, other = (checkpoint_tensors(runs.checkpoint(name)) for name in ("back", "back stopped"))
    assert one == other


@pytest.mark.parametrize(("name", "count"), [("back", 1), ("back stopped", 1), ("skip stopped", 2)])
def test_each_bad_step_is_counted_in_one_record_of_the_metrics(runs, name, count):
    """It was left out before a checkpoint, and the record came after a rollback to that, a stop, or both."""
    assert runs.results[name.replace("stopped", "resumed")] == {"code": 0, "error": ""}
    assert [(record["skipped"], record["spikes"]) for record in runs.train(name)] == [(count, count)]


@pytest.fixture(scope="module")
def killed(runs):
    """Kill a run two steps after its first rollback; then end it, and end a copy of it that may go back only once."""
    folder, copy = runs.run("killed"), runs.run("killed copy")
    sets = [BACK, "precision.compute=bf16", f"logging.folder={folder}"]
    worker = WORKERS / "bad_numbers_worker.py"
    kill = {"set": sets, "poison": SPIKE, "kill": {"step": SAVED + 2, "rollbacks": 1}}
    run_ranks(2, worker, runs.path, json.dumps([kill]), codes=(-signal.SIGKILL,))
    shutil.copytree(folder, copy)
    limit = {"set": [*sets, "reliability.max_rollbacks=1", f"logging.folder={copy}"], "poison": SPIKE}
    output = run_ranks(2, worker, runs.path, json.dumps([limit, {"set": sets, "poison": SPIKE}]))[0]
    return output, [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_a_run_that_is_killed_after_a_rollback_does_not_repeat_it(runs, killed):
    output, (_, ended) = killed
    assert ended == {"code": 0, "error": ""}
    assert "left out again: the samples of 1 bad steps" in output
    assert len(read_metrics(runs.run("killed"), "rollback")) == len(BAD_STEPS)
    assert_same_end(runs, "killed", "without spike")


def test_a_rollback_before_the_kill_counts_after_it(runs, killed):
    _, (limited, _) = killed
    assert limited["code"] == 2 and "went back to one checkpoint 1 times" in limited["error"], limited
    assert len(read_metrics(runs.run("killed copy"), "rollback")) == 1


def test_inspection_knows_a_rollback_before_the_next_checkpoint(runs, killed):
    """The copy stopped at its second bad step: its record has the samples of the first one."""
    config = load_config(runs.path, [f"logging.folder={runs.run('killed copy')}"])
    data, stream, positions = open_at_step(config, BAD_STEPS[0])
    assert data.history.orders[-1].left_out == ((BAD.start, BAD.start + BATCH),)
    original = open_data(load_config(runs.path)).training
    assert (stream.batch(positions) == original.batch(range(88, 96))).all()


def test_the_record_of_a_rollback_belongs_to_one_checkpoint_and_is_sealed(runs, tmp_path):
    saved, history = runs.checkpoint("rollback spike", SAVED), open_data(load_config(runs.path)).history
    assert read_rollback(tmp_path, saved) is None
    write_rollback(tmp_path, saved, 3, history.leave_out(range(8, 16)))
    record = read_rollback(tmp_path, saved)
    assert (record.rollbacks, record.data.orders[-1].left_out) == (3, ((8, 16),))
    assert read_rollback(tmp_path, runs.checkpoint("rollback spike")) is None
    path = rollback_path(tmp_path)
    text = path.read_text()
    for damaged in (text.replace("8,", "9,"), text[:-9], "", "[]", text.replace('"seal"', '"leal"')):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"rollback\.json: is damaged"):
            read_rollback(tmp_path, saved)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="cannot read"):
        read_rollback(tmp_path, saved)


def test_a_rollback_is_kept_when_the_config_changes_at_the_restart(runs):
    config = load_config(runs.path)
    data = open_data(config)
    saved = data.history
    rolled_back = saved.leave_out(range(72, 80))
    same = data.continue_from(saved, SAVED, rolled_back)
    assert same.history == rolled_back
    other = open_data(load_config(runs.path, ["training.global_batch_size=4"]))
    changed = other.continue_from(saved, SAVED, rolled_back).history
    assert changed.orders == rolled_back.orders and len(changed.batches) == 2
    again = other.continue_from(saved, SAVED, changed.leave_out(range(80, 84))).history  # of the run with 4 samples
    assert again == changed.leave_out(range(80, 84))


def test_samples_that_a_rollback_left_out_stay_out_of_other_data_or_are_told(runs):
    """A run goes back to step 8 from step 10, is killed, and goes on with one more source or other samples."""
    checkpoint = runs.checkpoint("rollback spike", SAVED)
    bad = range((SAVED + 1) * BATCH, (SAVED + 2) * BATCH)
    config = load_config(runs.path)
    data = open_data(config)
    record = RollbackRecord(checkpoint=fingerprint_of(checkpoint), rollbacks=1, data=data.history.leave_out(bad))
    start = Start("resumed", checkpoint, SAVED, record)
    write_tokens(runs.folder / "more", seed=5)
    more = yaml.safe_dump([{"path": str(runs.folder / name)} for name in ("more", "train")], default_flow_style=True)

    def go_on(*overrides: str) -> Continuation:
        changed = load_config(runs.path, ["data.on_change=continue", *overrides])
        return continue_run(changed, open_data(changed), start)

    def told(run: Continuation) -> list[str]:
        return [line for line in run.warnings if "that a rollback left out may be read again" in line]

    blended = go_on(f"data.train={more}")
    rows = {row.tobytes() for row in blended.data.training.batch(range(bad.start, 3 * bad.stop))}
    assert rows.isdisjoint(row.tobytes() for row in data.training.batch(bad)) and told(blended) == []
    (line,) = told(go_on("data.sequence_length=16"))
    assert line.startswith(f"{BATCH} samples of {runs.folder / 'train'} ")


def test_a_spike_leaves_an_incident_with_the_samples_that_are_left_out(runs):
    folders = sorted((runs.run("rollback spike") / "incidents").iterdir())
    assert [path.name for path in folders] == ["step_00000011", "step_00000011_2"]
    first, second = (json.loads((path / "incident.json").read_text()) for path in folders)
    assert first["kind"] == "spike" and first["action"] == "roll back"
    assert second["data"]["orders"][-1]["left_out"] == [[80, 88]]
    assert first["samples"][0]["first_token"] != second["samples"][0]["first_token"]


def test_too_many_rollbacks_stop_the_run_at_a_good_checkpoint(runs):
    result = runs.results["limit"]
    assert result["code"] == 2, result
    assert "the run went back to one checkpoint 1 times (reliability.max_rollbacks)" in result["error"]
    assert f"the weights of {runs.checkpoint('limit', SAVED)} are good" in result["error"]
    assert complete_checkpoints(runs.run("limit") / "checkpoints")[-1] == runs.checkpoint("limit", SAVED)


def test_skip_leaves_out_the_bad_steps_alone(runs):
    skipped = [record["step"] for record in runs.train("skip") if record["skipped"]]
    assert skipped == list(BAD_STEPS) == [r["step"] for r in runs.train("skip") if r["spikes"]]
    state = read_state(runs.checkpoint("skip"))
    assert (state.optimizer_steps, state.samples) == (STEPS - len(BAD_STEPS), STEPS * BATCH)


def test_ignore_takes_the_bad_steps_and_counts_them(runs):
    assert [record["step"] for record in runs.train("ignore") if record["spikes"]] == list(BAD_STEPS)
    assert not any(record["skipped"] for record in runs.train("ignore"))
    same = [record["loss"] for record in runs.train("skip")][: BAD_STEPS[0]]
    assert [record["loss"] for record in runs.train("ignore")][: BAD_STEPS[0]] == same


def test_stop_ends_the_run_before_the_bad_step_is_taken(runs):
    result = runs.results["stop"]
    assert result["code"] == 2 and f"step {BAD_STEPS[0]}: the " in result["error"], result
    assert f"the weights of {runs.checkpoint('stop', SAVED)} are good" in result["error"]
    assert complete_checkpoints(runs.run("stop") / "checkpoints")[-1] == runs.checkpoint("stop", SAVED)
