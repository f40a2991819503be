"""Trackers get a run's points under the field's names, keep one run over a resume, and never end or slow a run.

Each tracker is the real package, which writes to files: wandb offline, MLflow in its stores, trackio on this machine.
"""

from __future__ import annotations

import importlib.util
import json
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import pretrain, python, small_config, write_config, write_tokens
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megachiar.config.trackers import MlflowConfig, TrackioConfig, WandbConfig
from megachiar.errors import UserError
from megachiar.training.metrics import read_metrics
from megachiar.training.trackers import tracker_thread
from megachiar.training.trackers.points import Naming, Point
from megachiar.training.trackers.run_ids import FILE, RunIds
from megachiar.training.trackers.tensorboard_tracker import TensorBoardTracker
from megachiar.training.trackers.tracker import TrackedRun, check_package
from megachiar.training.trackers.tracker_thread import TrackerThread

NAMING = Naming(routed_layers=range(1, 3), validation=["valid", "other"])
SHARES = [0.0, 0.25, 0.75, 1.0]


def points(*steps: int) -> list[Point]:
    return [Point(step, {"loss": float(step)}, {"attention_share": SHARES}) for step in steps]


def tracked(folder: Path, history=lambda step: ()) -> TrackedRun:
    folder.mkdir(exist_ok=True)
    return TrackedRun(folder, {"model.num_layers": 4, "long": "x" * 9000}, RunIds(folder, pytest.fail), history)


def test_names_are_those_of_the_field():
    values = {
        "loss": 9.0,
        "mean_loss": 3.0,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5,
        "tokens_per_second": 7.0,
        "model_flops_utilisation": 0.4,
        "tokens": 100,
        "step_seconds": 2.0,
        "forward_seconds": None,
        "attention_share": SHARES,
        "entropy": [None, 0.5, 0.7, float("nan")],
        "gate": float("nan"),
    }
    point = NAMING.point(10, "train", values, {"tokens": 100, "elapsed_seconds": 5.0, "flops": 1e9})
    assert point.step == 10 and point.scalars == {
        "loss": 3.0,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 7.0,
        "mfu": 0.4,
        "tokens": 100,
        "elapsed_seconds": 5.0,
        "flops": 1e9,
        "time/step": 2.0,
        "attention_share": 0.5,
        "entropy": pytest.approx(0.6),
    }
    assert point.layers == {"attention_share": SHARES, "entropy": [0.0, 0.5, 0.7, 0.0]}


def test_the_first_validation_set_is_val_and_others_have_their_names():
    values = {"loss": 2.0, "bits_per_byte": 1.1, "token_ppl": 7.4, "tokens": 9, "complete": True, "word_ppl": None}
    first, other = (NAMING.point(4, f"evaluation/{name}", values, {"tokens": 8}) for name in ("valid", "other"))
    assert first.scalars == {"val/loss": 2.0, "val/bpb": 1.1, "val/ppl": 7.4, "tokens": 8}
    assert set(other.scalars) == {"val/other/loss", "val/other/bpb", "val/other/ppl", "tokens"}
    owed = NAMING.point(4, "evaluation_owed", {"names": ["valid"]}, {"tokens": 8})
    assert not owed.scalars and not owed.layers


def test_tensorboard_has_one_history_and_one_histogram_whose_bins_are_the_layers(tmp_path):
    tracker = TensorBoardTracker(tmp_path, 0)
    for point in points(1, 2, 3):
        tracker.log(point)
    tracker.rewind(1)
    for point in points(2, 4):
        tracker.log(point)
    tracker.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 4]
    bins = events.Histograms("attention_share/layers")[-1].histogram_value
    assert list(bins.bucket_limit) == [0.5, 1.5, 2.5, 3.5, 4.5] and list(bins.bucket) == [0.0, *SHARES]


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    """What the files of wandb's offline mode hold, the oldest session first."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for content in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): item.value_json for item in items})
            elif record.WhichOneof("record_type") == "run":
                rows.append({"id": record.run.run_id, "name": record.run.display_name, "tags": list(record.run.tags)})
    return rows


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of 32 KiB; parts with checksum, length and kind before them."""
    position, block, parts = 7, 1 << 15, b""  # after a header of wandb's own
    while position + 7 <= len(data):
        left = block - position % block
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_wandb_keeps_an_offline_run_over_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from megachiar.training.trackers.wandb_tracker import WandbTracker

    monkeypatch.setenv("WANDB_SILENT", "true")
    config = WandbConfig(project="p", mode="offline", tags=("a", "b"), name="mine")
    for steps in ((1, 2), (3,)):
        tracker = WandbTracker(config, tracked(tmp_path / "run"))
        for point in points(*steps):
            tracker.log(point)
        tracker.close()
        time.sleep(1.1)  # wandb names a session's folder by the second
    rows = wandb_records(tmp_path / "run")
    sessions = [row for row in rows if "id" in row]
    assert len({row["id"] for row in sessions}) == 1 and sessions[0]["name"] == "mine"
    assert sessions[0]["tags"] == ["a", "b"]
    logged = [row for row in rows if "step" in row]
    assert [json.loads(row["step"]) for row in logged] == [1, 2, 3]
    assert [json.loads(row["loss"]) for row in logged] == [1.0, 2.0, 3.0]
    values, bins = (json.loads(logged[0][f"attention_share/layers/{part}"]) for part in ("values", "bins"))
    assert values == SHARES and bins == [0.5, 1.5, 2.5, 3.5, 4.5]


def test_every_key_reaches_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from megachiar.training.trackers.wandb_tracker import WandbTracker

    asked: list[dict[str, Any]] = []

    def init(**keys: Any) -> SimpleNamespace:
        asked.append(keys)
        return SimpleNamespace(define_metric=lambda name, step_metric: None)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "login", lambda prompt=True: not prompt)
    keys = {"project": "p", "entity": "e", "name": "n", "group": "g", "tags": ("t",)}
    WandbTracker(WandbConfig(**keys), tracked(tmp_path / "run"))
    assert {key: asked[0][key] for key in keys} == {**keys, "tags": ["t"]}
    assert asked[0]["mode"] == "online" and asked[0]["dir"] == str(tmp_path / "run")
    WandbTracker(WandbConfig(), tracked(tmp_path / "run"))
    assert asked[1]["id"] == asked[0]["id"] and asked[1]["name"] == "run" and asked[1]["project"] == "megachiar"
    monkeypatch.setattr(wandb, "login", lambda prompt=True: prompt)
    with pytest.raises(RuntimeError, match="no API key"):
        WandbTracker(WandbConfig(), tracked(tmp_path / "run"))


@pytest.mark.parametrize("store", ["database", "files"])
def test_mlflow_keeps_a_run_over_a_resume(tmp_path, monkeypatch, store):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    from megachiar.training.trackers.mlflow_tracker import MlflowTracker, database_of

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions keep files for those who ask for them
    uri = f"file:{tmp_path}/store" if store == "files" else None
    folder = tmp_path / "run %20?#"  # signs that mean something in the address of a database
    config = MlflowConfig(tracking_uri=uri, experiment="e")
    for steps in ((1, 2), (3,)):
        tracker = MlflowTracker(config, tracked(folder))
        for point in points(*steps):
            tracker.log(point)
        tracker.close()
    client = MlflowClient(tracking_uri=uri or database_of(folder))
    assert (folder / "mlflow.db").exists() == (store == "database")
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.info.run_name == folder.name and run.info.status == "FINISHED"
    assert run.data.params["model.num_layers"] == "4" and len(run.data.params["long"]) == 500
    RunIds(folder, pytest.fail).keep("mlflow", "0" * 32)  # a run that somebody has removed for good
    MlflowTracker(MlflowConfig(tracking_uri=uri, experiment="e", name="again"), tracked(folder)).close()
    assert len(client.search_runs([run.info.experiment_id])) == 2
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 1), (2, 2), (3, 3)]


def trackio_steps(project: str) -> dict[str, list[int]]:
    """The steps of each run of a project, by its name."""
    from trackio.sqlite_storage import SQLiteStorage

    return {
        record["name"]: [row["step"] for row in SQLiteStorage.get_logs(project, record["name"])]
        for record in SQLiteStorage.get_run_records(project)
    }


def test_trackio_has_one_history_after_a_rollback_and_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # trackio reads it when it is imported, which is here
    pytest.importorskip("trackio")
    from megachiar.training.trackers.trackio_tracker import TrackioTracker

    run = tracked(tmp_path / "run", lambda step: points(*range(1, step + 1)))
    first = TrackioTracker(TrackioConfig(project="p"), run, 0)
    for point in points(1, 2, 3):
        first.log(point)
    first.rewind(1)
    for point in points(2, 3, 4):
        first.log(point)
    first.close()
    assert list(trackio_steps("p").values()) == [[1, 2, 3, 4]]
    second = TrackioTracker(TrackioConfig(project="p"), run, 2)
    second.log(points(3)[0])
    second.close()
    assert list(trackio_steps("p").values()) == [[1, 2, 3]]


class Broken:
    """A tracker whose network is gone for the first points."""

    def __init__(self, failures: int):
        self.failures, self.logged, self.opened = failures, [], 0

    def open(self, step: int) -> Broken:
        self.opened += 1
        return self

    def log(self, point: Point) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route to host\nmore")
        self.logged.append(point.step)

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


def test_a_tracker_that_fails_is_one_warning_and_is_opened_again(monkeypatch):
    monkeypatch.setattr(tracker_thread, "FIRST_WAIT_S", 0.0)
    said: list[str] = []
    broken = Broken(failures=2)
    thread = TrackerThread("wandb", broken.open, 0, said.append)
    for point in points(1, 2, 3, 4):
        thread.log(point)
    thread.close()
    assert broken.logged == [3, 4] and broken.opened == 3
    assert said == [
        "wandb cannot be written: no route to host. The run goes on without it, and tries again later",
        "wandb is written again; points that it lacks: 2",
    ]


def test_a_tracker_that_cannot_be_opened_is_one_warning():
    said: list[str] = []

    def refuse(step: int) -> Broken:
        raise OSError("read-only file system")

    thread = TrackerThread("mlflow", refuse, 0, said.append)
    for point in points(*range(50)):
        thread.log(point)
    thread.rewind(3)
    thread.close()
    assert len(said) == 1 and "mlflow cannot be written: read-only file system" in said[0]


def test_a_tracker_that_hangs_slows_nothing(monkeypatch):
    monkeypatch.setattr(tracker_thread, "MOST_WAITING", 5)
    said: list[str] = []
    gone = threading.Event()

    class Hanging(Broken):
        def log(self, point: Point) -> None:
            gone.wait(60)

    thread = TrackerThread("wandb", Hanging(0).open, 0, said.append)
    began = time.monotonic()
    for point in points(*range(1000)):
        thread.log(point)
    thread.rewind(1)
    thread.close(timeout=0.2)
    assert time.monotonic() - began < 5
    assert said == ["wandb does not end within 0.2 s: the run leaves it alone"]
    gone.set()


def test_ids_are_kept_and_a_damaged_record_is_said(tmp_path):
    said: list[str] = []
    RunIds(tmp_path, said.append).keep("wandb", "abc")
    assert RunIds(tmp_path, said.append).get("wandb") == "abc" and not said
    text = (tmp_path / FILE).read_text()
    for damaged in (text.replace("abc", "abd"), "{", "[]", '{"wandb": 3}'):
        (tmp_path / FILE).write_text(damaged)
        assert RunIds(tmp_path, said.append).get("wandb") is None
    assert len(said) == 4 and all("cannot be used" in line for line in said)


def test_a_missing_package_is_one_error_that_names_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logging.mlflow.*not installed") as caught:
        check_package("mlflow", "mlflow")
    assert "pip install 'megachiar[mlflow]'" in caught.value.remedy


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two runs of 12 steps with a record every 5: one at once, and one that was stopped and went on."""
    folder = tmp_path_factory.mktemp("trackers")
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=4)
    config = small_config(folder, training={"steps": 12}, schedule={"decay_steps": 12}, checkpoint={"every": 3})
    path = write_config(folder / "config.yaml", config)
    pretrain(path, f"logging.folder={folder / 'each'}", "logging.every=1")
    pretrain(path, f"logging.folder={folder / 'whole'}", "logging.every=5")
    for steps in (7, 12):
        pretrain(path, f"logging.folder={folder / 'parts'}", "logging.every=5", f"training.steps={steps}")
    return folder


def test_the_mean_loss_is_that_of_all_steps_since_the_last_record(runs):
    losses = {record["step"]: record["loss"] for record in read_metrics(runs / "each", "train")}
    means = {record["step"]: record["mean_loss"] for record in read_metrics(runs / "whole", "train")}
    assert list(means) == [5, 10, 12]
    assert means[5] == pytest.approx(np.mean([losses[step] for step in range(1, 6)]), rel=1e-12)
    assert means[12] == pytest.approx(np.mean([losses[11], losses[12]]), rel=1e-12)
    for record in read_metrics(runs / "whole", "train"):
        assert record["loss"] == losses[record["step"]]
    assert all(record["mean_loss"] == record["loss"] for record in read_metrics(runs / "each", "train"))


def test_what_a_run_has_spent_goes_on_over_a_resume(runs):
    whole, parts = (read_metrics(runs / name, "train") for name in ("whole", "parts"))
    assert [record["step"] for record in parts] == [5, 7, 10, 12]
    assert parts[-1]["flops"] == pytest.approx(whole[-1]["flops"], rel=1e-12) and whole[-1]["flops"] > 1e8
    for records in (whole, parts):
        elapsed = [record["elapsed_seconds"] for record in records]
        assert elapsed == sorted(elapsed) and elapsed[0] > 0
        assert all(record["tokens"] == record["samples"] * 32 for record in records)


def test_a_step_is_split_into_its_phases(runs):
    names = ("data", "forward", "backward", "optimizer", "communication")
    for record in read_metrics(runs / "whole", "train"):
        parts = [record[f"{name}_seconds"] for name in names]
        assert all(part >= 0 for part in parts) and 0.5 * record["step_seconds"] < sum(parts)
        assert sum(parts) <= record["step_seconds"] * 1.001


def test_a_run_whose_tracker_is_not_installed_ends_before_it_starts(tmp_path):
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1, documents=4)
    path = write_config(tmp_path / "config.yaml", small_config(tmp_path))
    program = tmp_path / "without.py"
    program.write_text(
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'wandb' else found(name, *more)\n"
        "from megachiar.console import run\n"
        "from megachiar.pretrain import main\n"
        "run(main)\n"
    )
    done = python(program, "--config", path, "--set", "logging.wandb={mode: offline}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "megachiar[wandb]" in done.stderr and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_goes_on_in_the_same_run_of_its_trackers(tmp_path):
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1, documents=4)
    config = small_config(tmp_path, training={"steps": 8}, logging={"tensorboard": True}, checkpoint={"every": 2})
    config["logging"] |= {"wandb": {"mode": "offline"}, "trackio": {"project": "p"}}
    path = write_config(tmp_path / "config.yaml", config)
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_SILENT": "true"}
    for steps in (4, 6):
        done = python("-m", "megachiar", "pretrain", "--config", path, "--set", f"training.steps={steps}", **env)
        assert done.returncode == 0 and "The run goes on without" not in done.stdout, done.stdout + done.stderr
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert {"val/loss", "lr", "grad_norm", "tokens_per_second", "elapsed_seconds"} <= set(events.Tags()["scalars"])
    assert not [tag for tag in events.Tags()["scalars"] if "layer" in tag]
    rows = wandb_records(tmp_path / "run")
    assert len({row["id"] for row in rows if "id" in row}) == 1
    assert [json.loads(row["step"]) for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [json.loads(row["step"]) for row in rows if "val/loss" in row] == [4, 6]
