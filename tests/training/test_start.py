"""A run starts fresh, from another run's weights, from all that another run saved, or from its own checkpoint."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import WORKERS, pretrain, run_ranks, small_config, write_config, write_tokens
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megachiar.checkpoint.format import checkpoint_name, read_state
from megachiar.checkpoint.reading import read_weights
from megachiar.config import load_config
from megachiar.data.storage.files import bin_path
from megachiar.training.metrics import read_metrics
from megachiar.training.run_data import open_at_step
from megachiar.training.schedule import learning_rate
from megachiar.training.start import Start, find_start

STEPS, MIDDLE = 8, 4
ALL = "checkpoint.load=all"


def make_run(folder: Path, **sections: dict) -> Path:
    """Write datasets and a config to ``folder``; dropout is on, so that a resumed run must draw the same masks."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokens(folder / "train")
    config = small_config(folder, checkpoint={"every": 1, "keep": None}, **sections)
    del config["data"]["validation"]
    config["model"]["dropout"] = 0.1
    config["training"] |= {"steps": STEPS, "global_batch_size": 4}
    return write_config(folder / "config.yaml", config)


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    """Return loss and gradient norm by step, in full precision."""
    return {r["step"]: (r["loss"], r["gradient_norm"]) for r in read_metrics(folder, "train")}


def saved(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / checkpoint_name(step)


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = read_weights(one), read_weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


LAYOUTS = {
    "one process, fp32": (1, {"parallel": {"zero_stage": 0}}),
    "two processes, ZeRO 2, bf16": (
        2,
        {"parallel": {"zero_stage": 2}, "precision": {"compute": "bf16"}, "training": {"micro_batch_size": 1}},
    ),
    "fp16 with dynamic loss scale": (
        1,
        {"precision": {"compute": "fp16", "initial_loss_scale": 2.0**20, "loss_scale_window": 3}},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_of_another_run_goes_on_bit_for_bit_and_is_loaded_once(tmp_path, name):
    ranks, sections = LAYOUTS[name]
    config = make_run(tmp_path, **sections)
    pretrain(config, ranks=ranks)
    whole, other, new = losses(tmp_path / "run"), tmp_path / "other", tmp_path / "new"
    shutil.copytree(saved(tmp_path / "run", MIDDLE), saved(other, MIDDLE))
    sets = [f"logging.folder={new}", f"checkpoint.load_from={other}", ALL]
    output = pretrain(config, *sets, f"training.steps={MIDDLE + 2}", f"schedule.decay_steps={STEPS}", ranks=ranks)[0]
    assert "weights, optimizer and position in the data from" in output and f"step {MIDDLE}, " in output
    assert not list(other.rglob("metrics.jsonl")) and [p.name for p in other.rglob("step_*")] == [
        checkpoint_name(MIDDLE)
    ]
    assert losses(new) == {step: whole[step] for step in (MIDDLE + 1, MIDDLE + 2)}
    shutil.rmtree(other)  # the second start has its own checkpoints and must not read the other run
    output = pretrain(config, *sets, f"schedule.decay_steps={STEPS}", ranks=ranks)[0]
    assert f"resumed from {saved(new, MIDDLE + 2)}" in output
    assert losses(new) == {step: whole[step] for step in range(MIDDLE + 1, STEPS + 1)}
    assert_same_weights(saved(new, STEPS), saved(tmp_path / "run", STEPS))
    ours, theirs = (read_state(saved(folder, STEPS)) for folder in (new, tmp_path / "run"))
    unlike = {"files", "checksums", "layout", "spent"}
    assert ours.model_dump(exclude=unlike) == theirs.model_dump(exclude=unlike)
    assert ours.spent.flops == theirs.spent.flops


def test_a_run_that_would_begin_after_its_last_step_is_refused(tmp_path):
    config = make_run(tmp_path)
    pretrain(config)
    sets = [f"logging.folder={tmp_path / 'new'}", f"checkpoint.load_from={tmp_path / 'run'}", ALL, "training.steps=2"]
    message = pretrain(config, *sets, codes=(2,))[0]
    assert "training.steps: ends the run at step 2, but " in message and f"is at step {STEPS} already" in message
    assert "Traceback" not in message and not (tmp_path / "new" / "checkpoints").exists()


def test_a_named_checkpoint_is_loaded_and_not_the_newest(tmp_path):
    config = make_run(tmp_path)
    pretrain(config)
    pretrain(config, f"logging.folder={tmp_path / 'new'}", f"checkpoint.load_from={saved(tmp_path / 'run', 2)}", ALL)
    assert losses(tmp_path / "new") == {step: losses(tmp_path / "run")[step] for step in range(3, STEPS + 1)}


def test_weights_alone_are_those_of_the_checkpoint_and_all_else_is_new(tmp_path):
    config = make_run(tmp_path, parallel={"zero_stage": 0})
    pretrain(config)
    source, new = saved(tmp_path / "run", MIDDLE), tmp_path / "new"
    rate = ["optimizer.learning_rate=1e-30", "training.steps=2"]  # the rate is too small to change a weight
    (output,) = pretrain(config, f"logging.folder={new}", f"checkpoint.load_from={source}", *rate)
    assert f"weights from {source}; optimizer, schedule and data start anew" in output
    assert_same_weights(saved(new, 1), source)
    state = read_state(saved(new, 1))
    assert (state.step, state.samples, state.optimizer_steps) == (1, 4, 1)
    assert sorted(losses(new)) == [1, 2]
    shutil.rmtree(tmp_path / "run")
    (output,) = pretrain(config, f"logging.folder={new}", f"checkpoint.load_from={source}", *rate, "training.steps=3")
    assert f"resumed from {saved(new, 2)}" in output and "weights from" not in output


def test_all_is_refused_where_a_resume_would_be_and_other_data_goes_on_where_that_is_asked_for(tmp_path):
    config = make_run(tmp_path, schedule={"kind": "constant"})
    pretrain(config, f"training.steps={MIDDLE}")
    other = write_tokens(tmp_path / "other", seed=5)
    new = [f"logging.folder={tmp_path / 'new'}", f"checkpoint.load_from={tmp_path / 'run'}", ALL]
    for changed, message in (
        ("model.hidden_size=64", "model.hidden_size is 32 in the checkpoint and 64 in the config"),
        ("training.seed=7", "training.seed: was 1234"),
        (f"data.train.0.path={other}", "data.train: was"),
    ):
        (output,) = pretrain(config, *new, changed, codes=(2,))
        assert message in " ".join(output.split()) and "Traceback" not in output and "remedy:" in output
        assert not (tmp_path / "new").exists()
    changes = [f"data.train.0.path={other}", "data.on_change=continue"]
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    pretrain(config, f"logging.folder={tmp_path / 'resumed'}", *changes)
    (output,) = pretrain(config, *new, *changes)
    assert "data.train was" in output and "from here on" in output
    went_on = losses(tmp_path / "new")
    assert sorted(went_on) == list(range(MIDDLE + 1, STEPS + 1))
    assert went_on == {step: losses(tmp_path / "resumed")[step] for step in went_on}


def test_a_dataset_of_the_same_size_in_the_place_of_the_one_that_was_read_is_refused(tmp_path):
    """It has no manifest, as Megatron's own have none: a few blocks of its files tell it apart."""
    config = make_run(tmp_path, schedule={"kind": "constant"})
    pretrain(config, f"training.steps={MIDDLE}")
    tokens = np.fromfile(bin_path(tmp_path / "train"), np.uint16)
    tokens[::-1].tofile(bin_path(tmp_path / "train"))
    (output,) = pretrain(config, codes=(2,))
    assert "data.train: was" in " ".join(output.split()) and "Traceback" not in output
    tokens.tofile(bin_path(tmp_path / "train"))
    pretrain(config)


def test_the_start_is_found_by_one_rule_that_inspection_follows(tmp_path):
    path = make_run(tmp_path)
    pretrain(path, f"training.steps={MIDDLE}")
    run, new = tmp_path / "run", f"logging.folder={tmp_path / 'new'}"
    load = f"checkpoint.load_from={run}"
    newest = saved(run, MIDDLE)
    for sets, expected in (
        ([new], Start("fresh")),
        ([new, load], Start("weights", newest)),
        ([new, load, ALL], Start("all", newest, MIDDLE)),
        ([new, f"checkpoint.load_from={saved(run, 2)}", ALL], Start("all", saved(run, 2), 2)),
        ([], Start("resumed", newest, MIDDLE)),
        ([f"checkpoint.load_from={tmp_path / 'nowhere'}", ALL], Start("resumed", newest, MIDDLE)),
    ):
        assert find_start(load_config(path, sets)) == expected
    bigger = ["training.global_batch_size=8", "data.on_change=continue", new, load]
    for sets, positions in (([], range(32, 40)), ([ALL], range(MIDDLE * 4, MIDDLE * 4 + 8))):
        assert open_at_step(load_config(path, [*bigger, *sets]), MIDDLE + 1)[2] == positions


@pytest.fixture
def apart(tmp_path):
    """Return the config of a run whose folder is a relative path, and the working directories of ranks 0 and 1."""
    config = make_run(tmp_path, training={"micro_batch_size": 1, "communication_timeout_s": 120})
    folders = [tmp_path / "host_0", tmp_path / "host_1"]
    for folder in folders:
        folder.mkdir()
    return config, folders


def start_apart(config: Path, folders: list[Path], *sets: str, codes: tuple[int, ...] = (0,)) -> list[str]:
    places = ",".join(map(str, folders))
    sets = ("logging.folder=run", f"training.steps={MIDDLE}", *sets)
    worker = WORKERS / "elsewhere_worker.py"
    return run_ranks(len(folders), worker, places, "--config", config, "--set", *sets, codes=codes)


def refused_apart(config: Path, folders: list[Path], *sets: str) -> str:
    """Return the one message of ranks that must all end in time; it must name rank 1 and its host."""
    began = time.monotonic()
    outputs = start_apart(config, folders, *sets, codes=(2,))
    assert time.monotonic() - began < 100
    assert "Traceback" not in "".join(outputs)
    assert [output.count("error:") for output in outputs] == [1, 0], outputs
    assert "remedy:" in outputs[0]
    message = " ".join(outputs[0].split())
    assert f"rank 1 on {socket.gethostname()}: " in message
    return message


def test_ranks_that_share_a_folder_start_and_leave_no_mark(apart):
    config, (folder, _) = apart
    start_apart(config, [folder, folder])
    names = ["checkpoints", "config.yaml", "events.jsonl", "metrics.jsonl", "results.json"]
    assert sorted(p.name for p in (folder / "run").iterdir()) == names


def test_a_rank_with_another_run_folder_ends_all_before_the_first_step(apart):
    config, folders = apart
    message = refused_apart(config, folders)
    assert f"{folders[1] / 'run'}: is not the folder that rank 0 sees" in message
    assert not list(folders[0].rglob("*.jsonl")) and not list(folders[0].rglob(".seen*"))
    assert not list(folders[1].iterdir())


def test_a_rank_that_does_not_see_the_checkpoint_ends_all(apart):
    config, folders = apart
    start_apart(config, [folders[0]] * 2)
    message = refused_apart(config, folders, f"training.steps={STEPS}")
    expected = saved(folders[1] / "run", MIDDLE)
    assert f"{expected}: rank 0 starts from this checkpoint, but on this rank state.json is missing" in message


def test_a_rank_that_sees_another_checkpoint_of_that_name_ends_all(apart):
    config, folders = apart
    for folder, seed in zip(folders, (1, 2), strict=True):
        start_apart(config, [folder] * 2, f"training.seed={seed}")
    message = refused_apart(config, folders, f"training.steps={STEPS}", "training.seed=1")
    assert "rank 0 starts from this checkpoint, but on this rank the path holds another checkpoint" in message


@pytest.mark.parametrize("load", ["weights", "all"])
def test_a_rank_that_does_not_see_the_other_run_ends_all(apart, load):
    config, folders = apart
    start_apart(config, [folders[0]] * 2, "logging.folder=old")
    sets = ["logging.folder=new", "checkpoint.load_from=old", f"checkpoint.load={load}", f"training.steps={STEPS}"]
    message = refused_apart(config, folders, *sets)
    assert f"{saved(folders[1] / 'old', MIDDLE)}: rank 0 starts from this checkpoint" in message
    assert not (folders[0] / "new").exists()


def test_a_rank_that_does_not_see_the_data_ends_all(apart):
    config, folders = apart
    write_tokens(folders[0] / "here")
    message = refused_apart(config, folders, "data.train.0.path=here")
    assert "here.idx" in message


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["checkpoint.resume=never"], "checkpoint.resume is never"),
        (["logging.folder=new", "checkpoint.load_from=nowhere"], "nowhere: no such folder"),
        (["logging.folder=run/config.yaml/new"], "cannot write: Not a directory"),
    ],
    ids=["resume never", "load from nowhere", "a file in the way"],
)
def test_what_rank_0_refuses_ends_all_with_its_message_alone(apart, sets, message):
    config, (folder, _) = apart
    start_apart(config, [folder, folder])
    outputs = start_apart(config, [folder, folder], *sets, codes=(2,))
    assert [output.count("error:") for output in outputs] == [1, 0], outputs
    assert message in " ".join(outputs[0].split()) and "Traceback" not in "".join(outputs)


def test_a_resumed_run_says_every_key_that_changed_and_both_learning_rates(tmp_path):
    config = make_run(tmp_path, schedule={"warmup_steps": 2})
    pretrain(config, "training.steps=4")
    same = pretrain(config, "training.steps=4")[0]
    assert "up to here" not in same
    changed = ["training.steps=8", "optimizer.weight_decay=0.2", "model.router.tau=0.6", "training.seed=1234"]
    output = " ".join(pretrain(config, *changed)[0].split())
    assert "training.steps was 4 up to here and is 8 from here on" in output
    assert "optimizer.weight_decay was 0.01 up to here and is 0.2 from here on" in output
    assert "model.router.tau was 0.79 up to here and is 0.6 from here on" in output
    assert output.count("up to here") == 3
    before, now = (learning_rate(load_config(config, [f"training.steps={steps}"]), 5) for steps in (4, 8))
    assert before == 0.0 and now > 1e-4
    assert f"learning rate of step 5: {now:.3e}, by the config of the checkpoint {before:.3e}" in output


def test_tensorboard_has_no_point_twice_after_a_restart_before_the_first_save(tmp_path):
    config = make_run(tmp_path)
    overrides = ["logging.tensorboard=true", "training.steps=4", "checkpoint.every=null"]
    pretrain(config, *overrides)
    first = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if it had been killed before it saved
    pretrain(config, *overrides)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == [1, 2, 3, 4]
    assert losses(tmp_path / "run") == first
