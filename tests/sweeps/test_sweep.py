"""A small sweep of real runs: killed, stopped, with a cell that fails, gone on with, changed, and put in a table."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from scipy.fft import dct
from support import ROOT, forked_python, process_environment, small_config, write_config, write_tokens

from megachiar.analysis.calibration import calibrate_on_embedding
from megachiar.analysis.windows import spread_windows
from megachiar.config import load_config
from megachiar.config.sweep import load_sweep
from megachiar.data.sampling.dataset import TokenSource, ValidationSet
from megachiar.data.sampling.history_records import SourceRecord
from megachiar.errors import EXIT_STOPPED, UserError
from megachiar.inference.loading import load_model
from megachiar.model.router import channel_permutations
from megachiar.sweeps.cell_data import check_same_data
from megachiar.sweeps.cells import cell_named, cells_of
from megachiar.sweeps.collect import collect, fitting, restorable, restore
from megachiar.sweeps.measured import measure, read_measured
from megachiar.sweeps.run_cells import refuse_changed, remove_needless_checkpoints, set_run_aside
from megachiar.sweeps.status import status_of
from megachiar.training.metrics import read_metrics
from megachiar.training.run_result import read_result

pytestmark = pytest.mark.timeout(1800)

STEPS = 120
VARIANTS = {
    "baseline": {"set": {"model.kind": "baseline"}},
    "threshold": {"calibrate": {"run": "baseline"}},
    "refused": {"set": {"precision.kernels": "triton"}},  # which is found where a run starts, not in its config
}


def write_sweep(folder: Path) -> Path:
    for seed, name in enumerate(("train", "valid", "test")):
        write_tokens(folder / name, seed=seed, documents=24 if name == "train" else 3)
    sections = {
        "data": {"test": {"held": str(folder / "test")}},
        "checkpoint": {"every": 10, "keep_best": "valid"},
        "training": {"steps": STEPS, "evaluate_every": 40},
    }
    write_config(folder / "base.yaml", small_config(folder, **sections))
    sweep = {"base": "base.yaml", "folder": str(folder / "out"), "seeds": [1, 2], "variants": VARIANTS}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path


def start(sweep: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megachiar", "sweep", str(sweep)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=process_environment(), **pipes)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Wait until a cell has recorded ``step``."""
    until = time.monotonic() + 300
    while not (run.is_dir() and (run / "metrics.jsonl").exists() and any(r["step"] >= step for r in read_metrics(run))):
        assert process.poll() is None and time.monotonic() < until, process.stdout.read()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, list[str]]:
    """A sweep that was killed in its first cell and stopped in its second; what each start printed."""
    path = write_sweep(tmp_path_factory.mktemp("swept"))
    out, outputs = path.parent / "out", []
    for cell, number in (("baseline/seed_1", signal.SIGKILL), ("threshold/seed_1", signal.SIGTERM)):
        process = start(path)
        wait_for_step(process, out / cell, 15)
        process.send_signal(number)
        outputs.append(process.communicate(timeout=300)[0])
        assert process.returncode == (EXIT_STOPPED if number == signal.SIGTERM else -number), outputs[-1]
    process = start(path)
    outputs.append(process.communicate(timeout=600)[0])
    assert process.returncode == 1, outputs[-1]
    return path, outputs


def test_a_sweep_goes_on_where_it_was(swept):
    path, outputs = swept
    out = path.parent / "out"
    assert "the sweep goes on from there when it is started again" in outputs[1]
    assert "[1/6] baseline/seed_1: finished already" in outputs[2]
    for cell in ("baseline/seed_1", "threshold/seed_1"):
        assert "resumed from" in (out / f"{cell}.log").read_text(), "the run went on from its checkpoint"
        assert [r["step"] for r in read_metrics(out / cell, "train")] == list(range(1, STEPS + 1))
    assert "launcher" in (out / "baseline" / "seed_1.log").read_text(), "the run of the killed sweep ended by itself"
    assert outputs[1].count("measured model.router.tau") + outputs[2].count("measured model.router.tau") == 2


def test_a_cell_that_fails_does_not_end_the_others(swept):
    path, outputs = swept
    assert outputs[2].count("failed with exit code 2") == 2 and "precision.kernels: is triton" in outputs[2]
    states = {status.cell.name: status.state for status in map(status_of, cells_of(load_sweep(path)))}
    assert states == {
        "baseline/seed_1": "finished",
        "threshold/seed_1": "finished",
        "refused/seed_1": "failed",
        "baseline/seed_2": "finished",
        "threshold/seed_2": "finished",
        "refused/seed_2": "failed",
    }
    shown = forked_python("-m", "megachiar", "sweep", path, "--status").stdout
    assert "baseline/seed_1   finished" in shown and "failed    exit code 2, step 0, see" in shown


def test_a_cells_threshold_is_that_of_the_baseline_of_its_seed(swept):
    """The best checkpoint of the baseline, its embedding, and the tokens of its first source."""
    sweep = load_sweep(swept[0])
    taus = []
    for seed in (1, 2):
        baseline = cell_named(sweep, f"baseline/seed_{seed}")
        best = read_result(baseline.run).best.step
        config, model, _ = load_model(baseline.run / "checkpoints" / f"step_{best:08d}")
        found = calibrate_on_embedding(model, TokenSource(config.data.train[0].path), 10_000_000)
        config = load_config(swept[0].parent / "out" / "threshold" / f"seed_{seed}" / "config.yaml")
        assert config.model.router.tau == pytest.approx(found.router["tau"], abs=1e-6)
        assert (config.training.seed, config.model.router.seed) == (seed, seed)
        taus.append(config.model.router.tau)
    assert taus[0] != taus[1]


def test_the_table_is_that_of_the_results(swept):
    path, outputs = swept
    done = forked_python("-m", "megachiar", "sweep", path, "--table", "--json")
    table = json.loads(done.stdout)
    rows = {(row["variant"], row["measure"]): row for row in table["rows"]}
    loss = {
        variant: np.array(
            [read_result(path.parent / "out" / variant / f"seed_{seed}").test["held"]["loss"] for seed in (1, 2)]
        )
        for variant in ("baseline", "threshold")
    }
    for variant, values in loss.items():
        row = rows[variant, "test.held.loss"]
        assert (row["n"], row["mean"]) == (2, pytest.approx(values.mean()))
        assert row["deviation"] == pytest.approx(values.std(ddof=1))
    interval = stats.ttest_rel(loss["threshold"], loss["baseline"]).confidence_interval(0.95)
    difference = rows["threshold", "test.held.loss"]["difference"]
    assert (difference["low"], difference["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert rows["baseline", "test.held.loss"]["difference"] is None
    assert "validation.valid.best.loss" in {measure for _, measure in rows}
    assert ("baseline", "attention_share") not in rows and 0 < rows["threshold", "attention_share"]["mean"] < 1
    shown = outputs[2]
    assert f"{loss['threshold'].mean():.4f} ± {loss['threshold'].std(ddof=1):.4f}" in shown
    assert "minus baseline, 95 %" in shown and "refused" not in shown.split("standard deviation")[1]
    with open(path.parent / "out" / "table.csv") as file:
        lines = [line for line in csv.DictReader(file) if line["measure"] == "test.held.loss"]
    assert [float(line["mean"]) for line in lines] == [pytest.approx(values.mean()) for values in loss.values()]
    assert json.loads((path.parent / "out" / "table.json").read_text())["rows"] == table["rows"]


def test_results_are_collected_without_weights(swept, tmp_path):
    path, _ = swept
    assert forked_python("-m", "megachiar", "sweep", path, "--collect", tmp_path).returncode == 0
    folder = tmp_path / "sweep"
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    cells = {f"{variant}/seed_{seed}" for variant in ("baseline", "threshold") for seed in (1, 2)}
    measured = {f"threshold/seed_{seed}.measured.json" for seed in (1, 2)}
    assert names == {f"{cell}.json" for cell in cells} | measured | {"sweep.yaml", "table.json", "table.csv"}
    shutil.copy(path, tmp_path / "sweep.yaml")
    (tmp_path / "base.yaml").write_text((path.parent / "base.yaml").read_text())
    (there, collected) = (
        forked_python("-m", "megachiar", "sweep", sweep, "--table", "--json", *more).stdout
        for sweep, more in ((path, []), (tmp_path / "sweep.yaml", ["--from", tmp_path]))
    )
    assert json.loads(there) == json.loads(collected)


def test_a_sweep_goes_on_from_results_that_were_collected(swept, tmp_path):
    """Another machine has results and no run. Where a threshold is missing its baseline is needed again."""
    path, _ = swept
    assert forked_python("-m", "megachiar", "sweep", path, "--collect", tmp_path / "found").returncode == 0
    for name in ("sweep.yaml", "base.yaml"):
        text = (path.parent / name).read_text()
        (tmp_path / name).write_text(text.replace(str(path.parent / "out"), str(tmp_path / "out")))
    for file in (tmp_path / "found" / "sweep" / "threshold").glob("seed_2*"):
        file.unlink()
    found = ["sweep", tmp_path / "sweep.yaml", "--from", tmp_path / "found"]
    shown = forked_python("-m", "megachiar", *found, "--status", "--json")
    assert shown.returncode == 0 and shown.stderr.count("its result is taken from") == 2, shown.stderr
    assert not (tmp_path / "out").exists(), "a look writes nothing"
    told = {name: status["state"] for name, status in json.loads(shown.stdout).items()}
    restore(restorable(cells_of(load_sweep(tmp_path / "sweep.yaml")), tmp_path / "found"), tmp_path / "found")
    assert told == states(tmp_path / "sweep.yaml")
    wanted = {"baseline/seed_1": "finished", "threshold/seed_1": "finished", "refused/seed_1": "new"}
    wanted |= {"baseline/seed_2": "new", "threshold/seed_2": "waiting", "refused/seed_2": "new"}
    assert states(tmp_path / "sweep.yaml") == wanted
    shutil.copytree(path.parent / "out" / "baseline" / "seed_2", tmp_path / "out" / "baseline" / "seed_2")
    assert states(tmp_path / "sweep.yaml")["threshold/seed_2"] == "new"
    change(tmp_path / "sweep.yaml", "threshold", set={"optimizer.learning_rate": 0.1})
    shutil.rmtree(tmp_path / "out")
    shown = forked_python("-m", "megachiar", "sweep", tmp_path / "sweep.yaml", "--from", tmp_path / "found", "--status")
    assert shown.stderr.count("its result is taken from") == 0, "a result of another config is none"
    assert "threshold/seed_1: its result in" in shown.stderr and "is left out: has another config" in shown.stderr
    table = forked_python("-m", "megachiar", *found, "--table", "--json")
    assert set(json.loads(table.stdout)["finished"]) == {"baseline"}, table.stderr
    assert "is left out: has another config" in table.stderr


@pytest.mark.parametrize("name", ["train", "test"])
def test_results_of_another_text_do_not_count(swept, tmp_path, name):
    """The config of a cell has only the path of a text, which may be written anew: no two texts are one mean."""
    path, folder = swept[0], swept[0].parent
    assert forked_python("-m", "megachiar", "sweep", path, "--collect", tmp_path / "found").returncode == 0
    kept = {file: file.read_bytes() for file in folder.glob(f"{name}.*")}
    try:
        for file in kept:
            file.unlink()
        write_tokens(folder / name, seed=7, documents=6)
        detail = f"was trained or measured on another dataset {folder / name}"
        statuses = {status.cell.name: status for status in map(status_of, cells_of(load_sweep(path)))}
        assert (statuses["baseline/seed_1"].state, statuses["baseline/seed_1"].detail) == ("changed", detail)
        table = forked_python("-m", "megachiar", "sweep", path, "--from", tmp_path / "found", "--table")
        assert table.returncode == 2 and table.stderr.count("is left out: was trained or measured") == 4
    finally:
        for file in folder.glob(f"{name}.*"):
            file.unlink()
        for file, content in kept.items():
            file.write_bytes(content)
    assert states(path)["baseline/seed_1"] == "finished"


def test_a_table_refuses_results_of_two_texts_under_one_path(swept):
    """Results of another machine, whose data are not here, are compared with one another."""
    results = {seed: read_result(swept[0].parent / f"out/baseline/seed_{seed}") for seed in (1, 2)}
    check_same_data({"baseline": results})
    one, other = (
        result.model_copy(update={"test_data": {"held": record_with(result.test_data["held"], f"{seed}")}})
        for seed, result in results.items()
    )
    with pytest.raises(UserError, match=r"held another text for baseline/seed_2 than for baseline/seed_1"):
        check_same_data({"baseline": {1: one, 2: other}})


def record_with(record: SourceRecord, checksum: str) -> SourceRecord:
    return record.model_copy(update={"checksum": checksum})


@pytest.mark.slow
def test_two_starts_share_the_cells(tmp_path):
    path = write_sweep(tmp_path)
    sweep = yaml.safe_load(path.read_text())
    equal = {"share_of": "threshold", "set": {"model.router.kind": "random", "model.router.tau": None}}
    # In a row of three the last one waits for a cell that waits itself for one which the other start trains.
    sweep["variants"] = {"baseline": VARIANTS["baseline"], "threshold": VARIANTS["threshold"], "equal": equal}
    path.write_text(yaml.safe_dump(sweep | {"set": {"training.steps": 20}}, sort_keys=False))
    both = [start(path), start(path)]
    outputs = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert set(states(path).values()) == {"finished"}
    assert not list((tmp_path / "out").rglob("*.failed.json"))
    for cell in ("baseline/seed_1", "threshold/seed_2"):
        assert [r["step"] for r in read_metrics(tmp_path / "out" / cell, "train")] == list(range(1, 21))


@pytest.fixture
def changeable(swept, tmp_path) -> Path:
    """A copy of the sweep whose file may be changed; its datasets stay where they are."""
    shutil.copytree(swept[0].parent / "out", tmp_path / "out")
    for name in ("sweep.yaml", "base.yaml"):
        text = (swept[0].parent / name).read_text()
        (tmp_path / name).write_text(text.replace(str(swept[0].parent / "out"), str(tmp_path / "out")))
    return tmp_path / "sweep.yaml"


def change(path: Path, variant: str, **keys: object) -> None:
    sweep = yaml.safe_load(path.read_text())
    sweep["variants"][variant] |= keys
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))


def states(path: Path) -> dict[str, str]:
    return {status.cell.name: status.state for status in map(status_of, cells_of(load_sweep(path)))}


def test_a_changed_variant_is_refused_and_rerun_when_told(changeable):
    assert states(changeable)["threshold/seed_1"] == "finished"
    change(changeable, "threshold", set={"optimizer.learning_rate": 1e-3})
    statuses = [status_of(cell) for cell in cells_of(load_sweep(changeable))]
    assert [status.state for status in statuses].count("changed") == 2
    with pytest.raises(UserError, match=r"threshold/seed_1 differs in optimizer\.learning_rate; threshold/seed_2"):
        refuse_changed(statuses)
    done = forked_python("-m", "megachiar", "sweep", changeable, "--dry-run")
    assert done.returncode == 2 and "--rerun-changed" in done.stderr, done.stderr
    kept = set_run_aside(cell_named(load_sweep(changeable), "threshold/seed_1"))
    assert kept.name == "seed_1.set_aside_1" and read_result(kept) is not None
    assert states(changeable)["threshold/seed_1"] == "new"


def test_what_was_measured_on_a_changed_run_is_measured_anew(changeable):
    """The baseline has another learning rate now: neither its runs nor the thresholds from them count."""
    change(changeable, "baseline", set={"model.kind": "baseline", "optimizer.learning_rate": 1e-3})
    found = states(changeable)
    assert {found[f"{variant}/seed_1"] for variant in ("baseline", "threshold")} == {"changed"}
    change(changeable, "baseline", set={"model.kind": "baseline"})
    assert states(changeable)["threshold/seed_1"] == "finished"
    change(changeable, "threshold", calibrate={"run": "baseline", "where": "layers"})
    assert states(changeable)["threshold/seed_1"] == "changed"


def test_collected_results_measured_on_a_changed_run_do_not_count(changeable):
    """A threshold of an older baseline is none of this sweep, though the config of its own cell is the same."""
    found = changeable.parent / "found"
    collect(load_sweep(changeable), list(map(status_of, cells_of(load_sweep(changeable)))), found)
    cells = {"baseline/seed_1", "threshold/seed_1", "baseline/seed_2", "threshold/seed_2"}
    assert fitting(cells_of(load_sweep(changeable)), found).keys() == cells
    change(changeable, "baseline", set={"model.kind": "baseline", "optimizer.learning_rate": 1e-3})
    assert not fitting(cells_of(load_sweep(changeable)), found)
    again = forked_python("-m", "megachiar", "sweep", changeable, "--collect", found)
    assert again.returncode == 0 and again.stderr.count("is left out: ") == 4, again.stderr
    assert "the table has no baseline/seed_1, threshold/seed_1, baseline/seed_2, threshold/seed_2" in again.stderr
    table = forked_python("-m", "megachiar", "sweep", changeable, "--from", found, "--table")
    assert table.returncode == 2 and table.stderr.count("is left out") == 4, table.stderr


def test_thresholds_of_layers_are_those_of_the_router_that_takes_them(changeable):
    """A hashed router sees the channels in the order of its seed, and the share is to be that of its own H."""
    hashed = {"model.router.kind": "hashed", "model.router.tau": None}
    request = {"run": "baseline", "where": "layers", "attention_share": 0.3, "sequences": 8}
    sweep = yaml.safe_load(changeable.read_text())
    sweep["variants"] |= {"plain": {"calibrate": request}, "hashed": {"set": hashed, "calibrate": request}}
    changeable.write_text(yaml.safe_dump(sweep, sort_keys=False))
    sweep, taus = load_sweep(changeable), {}
    baseline = cell_named(sweep, "baseline/seed_2")
    for variant in ("plain", "hashed"):
        cell = cell_named(sweep, f"{variant}/seed_2")
        taus[variant] = measure(cell, {"baseline": read_result(baseline.run)}).keys["model.router.tau"]
    config, model, _ = load_model(baseline.run / "checkpoints" / f"step_{read_result(baseline.run).best.step:08d}")
    rows = {}
    for index in (1, 2):
        model.layers[index].register_forward_pre_hook(lambda _, inputs, i=index: rows.update({i: inputs[0].numpy()}))
    text = ValidationSet(config.data.train[0].path, config.sequence_length)
    with torch.no_grad():
        model(torch.from_numpy(spread_windows(text, 8)[0]))
    for index, tau in zip((1, 2), taus["hashed"], strict=True):
        order = channel_permutations(2, config.model.num_layers, config.model.hidden_size, torch.device("cpu"))[index]
        power = dct(rows[index][:, order.numpy()], norm="ortho") ** 2
        h = stats.entropy(power, axis=-1) / np.log(config.model.hidden_size)
        assert (h > tau).mean() == pytest.approx(0.3, abs=0.02)
    assert taus["plain"] != taus["hashed"]


def test_another_test_set_alone_is_measured_without_training(changeable, swept):
    change(changeable, "baseline", set={"model.kind": "baseline", "data.test.held": str(swept[0].parent / "valid2")})
    write_tokens(swept[0].parent / "valid2", seed=9, documents=2)
    status = status_of(cell_named(load_sweep(changeable), "baseline/seed_1"))
    assert (status.state, status.detail) == ("stopped", f"at step {STEPS}")


def test_a_layout_is_no_change(changeable):
    change(changeable, "baseline", set={"model.kind": "baseline", "parallel.zero_stage": 0})
    assert states(changeable)["baseline/seed_1"] == "finished"


def test_checkpoints_go_when_no_cell_needs_them(changeable):
    """Until the threshold of seed 2 is measured, the baseline's checkpoints of seed 2 stay."""
    out = changeable.parent / "out"
    (out / "threshold" / "seed_2.measured.json").unlink()
    shutil.rmtree(out / "threshold" / "seed_2")
    remove_needless_checkpoints(load_sweep(changeable))
    left = {str(path.parent.parent.relative_to(out)) for path in out.rglob("checkpoints/step_*")}
    assert left == {"baseline/seed_2"}
    assert states(changeable)["baseline/seed_1"] == states(changeable)["threshold/seed_1"] == "finished"
    cell = cell_named(load_sweep(changeable), "threshold/seed_2")
    results = {"baseline": read_result(out / "baseline" / "seed_2")}
    found = measure(cell, results)
    assert read_measured(cell, {"baseline": results["baseline"].config_digest}) == found
    shutil.rmtree(out / "baseline" / "seed_2" / "checkpoints")
    with pytest.raises(UserError, match="is gone, and another variant has to be calibrated on it"):
        measure(cell, results)


def test_a_control_at_equal_share_takes_the_share_of_its_seed(changeable):
    random = {"share_of": "threshold", "set": {"model.router.kind": "random", "model.router.tau": None}}
    sweep = yaml.safe_load(changeable.read_text())
    sweep["variants"]["equal"] = random
    changeable.write_text(yaml.safe_dump(sweep, sort_keys=False))
    cell = cell_named(load_sweep(changeable), "equal/seed_2")
    assert (status_of(cell).state, status_of(cell).detail) == ("new", "is to be measured first")
    done = forked_python("-m", "megachiar", "sweep", changeable, "--cell", "equal/seed_2")
    assert done.returncode == 0, done.stderr
    config = load_config(done.stdout.strip())
    share = read_result(changeable.parent / "out" / "threshold" / "seed_2").attention_share
    assert config.model.router.attention_share == pytest.approx(share, abs=1e-6)
    assert status_of(cell).config.model.router == config.model.router
    done = forked_python("-m", "megachiar", "sweep", changeable, "--cell", "baseline/seed_2")
    assert done.returncode == 0 and done.stdout == "" and "is finished" in done.stderr
