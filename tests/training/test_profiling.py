"""A profile of a run is a trace that Perfetto opens, with the names of a step's phases; a run without one has no more.

Perfetto reads the Trace Event Format: JSON with a list of events, each complete one with a beginning and a duration.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from support import pretrain, python, small_config, write_config, write_tokens

from megachiar.config import load_config
from megachiar.config.errors import ConfigError
from megachiar.config.identity import config_digest
from megachiar.errors import UserError
from megachiar.phases import phase
from megachiar.topology import Topology
from megachiar.training.profiling import Profiler, check_profiling

NAMES = {"data", "forward", "route", "attention", "dct", "feed-forward", "loss", "backward", "optimizer", "save"}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("profiling")
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=4)
    made = small_config(folder, training={"steps": 6}, checkpoint={"every": 3})
    return write_config(folder / "config.yaml", made)


def events(path: Path) -> list[dict]:
    """The events of a trace, checked for what a reader of the format needs."""
    with gzip.open(path, "rt") as file:
        trace = json.load(file)
    found = trace["traceEvents"]
    assert found and all(isinstance(event["ph"], str) and "pid" in event for event in found)
    complete = [event for event in found if event["ph"] == "X"]
    assert complete and all(event["ts"] >= 0 and event["dur"] >= 0 and event["name"] for event in complete)
    return complete


def named(path: Path) -> dict[str, int]:
    """How often each phase of ours is in a trace."""
    counts: dict[str, int] = {}
    for event in events(path):
        if event.get("cat") == "user_annotation" and event["name"] in NAMES:
            counts[event["name"]] = counts.get(event["name"], 0) + 1
    return counts


@pytest.mark.parametrize("interval", [None, 2])
def test_a_trace_has_the_phases_and_the_log_the_dearest(config, tmp_path, interval):
    changes = [f"logging.folder={tmp_path}", "profiling.steps=[2, 3]", "profiling.memory=true"]
    changes += [f"training.activation_checkpoint_interval={json.dumps(interval)}"]
    (output,) = pretrain(config, *changes)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps_2-3_rank_0.json.gz"
    counts = named(path)
    assert set(counts) == NAMES
    assert counts["forward"] == counts["backward"] == 2 * 4 and counts["save"] == 1
    assert counts["feed-forward"] == 2 * 4 * 4 * (1 if interval is None else 2), "recomputed layers have names too"
    lines = " ".join(output.split())
    assert "profile of steps 2 to 3" in lines and "10 dearest operations" in lines and "aten::" in lines
    assert "step 6/6" in lines


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, ["parallel.pipeline_size=2"]),
        (2, ["parallel.tensor_size=2", "parallel.sequence=true"]),
        (2, ["parallel.zero_stage=3", "training.activation_checkpoint_interval=1"]),
    ],
)
def test_every_layout_has_traces(config, tmp_path, ranks, changes):
    more = [f"logging.folder={tmp_path}", "profiling.steps=[2, 2]", "profiling.ranks=[0, 1]", "training.steps=2"]
    pretrain(config, *more, *changes, ranks=ranks)
    paths = sorted((tmp_path / "profile").iterdir())
    assert [path.name for path in paths] == [f"steps_2-2_rank_{rank}.json.gz" for rank in range(ranks)]
    found = [set(named(path)) for path in paths]
    assert all({"attention", "feed-forward", "save"} <= names for names in found)
    assert "loss" in found[-1] and "dct" in found[0]


def test_a_run_that_stops_writes_what_it_has_recorded(tmp_path):
    made = load_config_of(tmp_path, "profiling.steps=[2, 9]", "training.steps=10")
    said: list[str] = []
    profiler = Profiler(made, 0, torch.device("cpu"), said.append)
    for step in (1, 2, 3):
        profiler.begin_step(step)
        with phase("forward"):
            torch.ones(4).sum()
    profiler.end_step(3)
    assert not said
    profiler.close(3)
    profiler.begin_step(4)
    profiler.close(4)
    assert [path.name for path in (made.logging.folder / "profile").iterdir()] == ["steps_2-3_rank_0.json.gz"]


def test_a_disk_that_refuses_the_trace_is_a_warning(tmp_path):
    made = load_config_of(tmp_path, "profiling.steps=[1, 1]")
    made.logging.folder.mkdir()
    (made.logging.folder / "profile").write_text("a file in the way")
    said: list[str] = []
    profiler = Profiler(made, 0, torch.device("cpu"), said.append)
    profiler.begin_step(1)
    torch.ones(4).sum()
    profiler.end_step(1)
    assert "was not written" in said[0] and "File exists" in said[0]


def load_config_of(folder: Path, *changes: str):
    return load_config(write_config(folder / "config.yaml", small_config(folder)), changes)


def test_a_name_outside_a_profile_adds_nothing():
    assert phase("loss") is phase("route")
    with torch.profiler.profile() as recorded:
        assert phase("loss") is not phase("loss")
        with phase("loss"):
            torch.ones(2)
    assert "loss" in {event.name for event in recorded.events()}
    assert phase("loss") is phase("route")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["profiling.steps=[5, 4]"], "the last step is before the first"),
        (["profiling.steps=[50, 55]"], "ends at step 55, but the run has 20 steps"),
        (["profiling.steps=[3, 5]", "training.steps=null", "training.tokens=1024"], "but the run has 4 steps"),
        (["profiling.steps=[0, 5]"], "profiling.steps.0"),
        (["profiling.steps=[1]"], "profiling.steps"),
        (["profiling.steps=[1, 2]", "profiling.ranks=[]"], "profiling.ranks"),
    ],
)
def test_steps_that_the_run_does_not_have_are_refused(tmp_path, changes, said):
    with pytest.raises(ConfigError, match="profiling") as caught:
        load_config_of(tmp_path, *changes)
    assert said in str(caught.value)


def test_ranks_and_steps_are_checked_when_the_run_is_known(tmp_path):
    topology = Topology(0, 2, 0, data_rank=0, data_size=2, pipeline_size=1)
    check_profiling(load_config_of(tmp_path), topology)
    check_profiling(load_config_of(tmp_path, "profiling.steps=[1, 2]", "profiling.ranks=[1]"), topology)
    with pytest.raises(UserError, match="names rank 2, but the run has 2 ranks"):
        check_profiling(load_config_of(tmp_path, "profiling.steps=[1, 2]", "profiling.ranks=[0, 2]"), topology)
    of_epochs = load_config_of(tmp_path, "profiling.steps=[1, 9]", "training.steps=null", "training.epochs=1")
    with pytest.raises(UserError, match="ends at step 9, but the run has 8 steps"):
        check_profiling(of_epochs.with_steps(8), topology)


def test_a_rank_that_is_not_there_ends_the_run_before_it_starts(config, tmp_path):
    changes = [f"logging.folder={tmp_path / 'run'}", "profiling.steps=[1, 2]", "profiling.ranks=[4]"]
    done = python("-m", "megachiar", "pretrain", "--config", config, "--set", *changes)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "names rank 4" in done.stderr
    assert not (tmp_path / "run").exists()


def test_profiles_and_trackers_are_no_part_of_a_result(tmp_path):
    plain = config_digest(load_config_of(tmp_path))
    for change in ("profiling.steps=[1, 2]", "logging.wandb={}", "logging.mlflow={}", "logging.trackio={}"):
        assert config_digest(load_config_of(tmp_path, change)) == plain
