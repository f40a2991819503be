"""``megachiar analyze-routing`` on real runs: its tables, files and refusals."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from labelled import write_examples
from support import forked_python, pretrain, replace_in_config, small_config, write_config, write_tokens

from megachiar.analysis.calibration import calibrate_on_layers
from megachiar.analysis.windows import spread_windows
from megachiar.checkpoint.format import complete_checkpoints
from megachiar.data.sampling.dataset import ValidationSet
from megachiar.inference.loading import load_for_inference

FEW = ("--sequences", 8, "--switches", 12, "--permutations", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of a CHIAR model with three checkpoints, one of its baseline, and one whose router is soft."""
    folder = tmp_path_factory.mktemp("runs")
    write_tokens(folder / "train")
    write_tokens(folder / "valid", seed=1, documents=8)
    write_tokens(folder / "short", seed=2, documents=1)
    for name, model in (("chiar", {}), ("baseline", {"kind": "baseline"}), ("soft", {"router": {"kind": "soft"}})):
        config = small_config(folder)
        config["model"] |= model
        config["training"] |= {"steps": 6, "micro_batch_size": 4}
        config["checkpoint"] = {"every": 2, "keep": 5}
        config["logging"]["folder"] = str(folder / name)
        pretrain(write_config(folder / f"{name}.yaml", config))
    return folder


def analyse(*arguments: object, code: int = 0):
    done = forked_python("tools/analyze_routing.py", *arguments)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def record(folder):
    done = analyse(folder / "chiar", *FEW, "--baseline", folder / "baseline", "--json", "-", "--csv", folder / "r.csv")
    return json.loads(done.stdout)


def pick(record: dict, section: str, layer: int | None, measure: str) -> dict:
    (found,) = (
        f for f in record["findings"] if (f["section"], f["layer"]) == (section, layer) and measure in f["measure"]
    )
    return found


def test_every_question_is_answered_for_every_layer(record):
    sections = ("shares", "entropy", "channels", "information", "loss", "distance", "stability", "value", "predictors")
    for layer in (2, 3):
        assert [f["section"] for f in record["findings"] if f["layer"] == layer and f["verdict"]]
        assert {f["section"] for f in record["findings"] if f["layer"] == layer} == set(sections)
    assert {f["section"] for f in record["findings"] if f["layer"] is None} == {"other routes"}
    assert set(record["verdicts"]) == {"2", "3"} and (record["sequences"], record["switches"]) == (8, 12)
    # the datasets of this test have no tokenizer
    assert len(record["left_out"]) == 1 and record["left_out"][0].startswith("kinds of words")


def test_shares_and_h_are_those_of_the_calibration(folder, record):
    """H and its distance from noise have one definition; the share is that of the model's own statistics."""
    config, model, _ = load_for_inference(folder / "chiar")
    dataset = ValidationSet(folder / "valid", config.sequence_length)
    windows = spread_windows(dataset, 8)
    shares = model(torch.from_numpy(windows.inputs)).statistics.attention_share
    for layer in (2, 3):
        assert pick(record, "shares", layer, "attention")["value"] == pytest.approx(shares[layer - 1].item(), abs=1e-6)
    place = calibrate_on_layers(model, dataset, 0.5, 8).places[0]
    found = pick(record, "entropy", 2, "distance")
    assert found["value"] == pytest.approx(place.noise_distance, abs=1e-9)
    assert found["details"]["mean"] == pytest.approx(place.measured.mean, abs=1e-9)
    assert pick(record, "entropy", 2, "independent")["value"] == pytest.approx(place.effective_tokens, rel=1e-6)
    assert ("unlike" not in found["verdict"]) == place.like_noise


def test_checkpoints_are_compared_in_order(record):
    steps = [f["measure"] for f in record["findings"] if f["section"] == "stability" and f["layer"] == 2]
    assert steps == [f"routes kept from step {a} to {b}, beyond chance" for a, b in ((2, 4), (4, 6))]


def test_h_is_compared_with_the_baselines_layer_of_the_same_number(record):
    for layer in (2, 3):
        names = [f["measure"] for f in record["findings"] if f["section"] == "distance" and f["layer"] == layer]
        assert [name.rpartition(", ")[2] for name in names] == ["mean of its layers", f"its layer {layer}"]


def test_the_csv_has_a_line_for_each_number(folder, record):
    lines = list(csv.DictReader((folder / "r.csv").open()))
    assert len(lines) == len(record["findings"])
    for line, finding in zip(lines, record["findings"], strict=True):
        assert line["measure"] == finding["measure"] and line["verdict"] == finding["verdict"]
        assert line["value"] == ("" if finding["value"] is None else str(finding["value"]))


def test_the_same_seed_gives_the_same_numbers_and_tables_show_them(folder, record):
    path = folder / "again.json"
    done = analyse(folder / "chiar", *FEW, "--baseline", folder / "baseline", "--json", path)
    assert json.loads(path.read_text()) == record
    shown = " ".join(done.stdout.split())
    for words in ("Which operator takes how many tokens", "regret (0 the oracle, 1 a coin)", "In short", "layer 3:"):
        assert words in shown
    share = pick(record, "shares", 2, "attention")
    assert f"{share['value']:.3f}" in shown and f"[{share['low']:.3f}, {share['high']:.3f}]" in shown
    other = json.loads(analyse(folder / "chiar", *FEW, "--seed", 1, "--json", "-").stdout)
    regrets = [pick(r, "value", 2, "regret")["value"] for r in (record, other)]
    assert regrets[0] != regrets[1]


def test_what_was_not_measured_is_said(folder):
    one = next((folder / "chiar" / "checkpoints").glob("step_*4"))
    found = json.loads(analyse(one, *FEW, "--switches", 0, "--json", "-").stdout)
    assert found["step"] == 4
    left_out = " ".join(found["left_out"])
    assert "--baseline" in left_out and "two checkpoints" in left_out
    assert not {"value", "distance", "stability"} & {f["section"] for f in found["findings"]}
    soft = analyse(folder / "soft", *FEW).stdout
    assert "a soft router gives every token all operators" in " ".join(soft.split())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("baseline",), "has no layer that routes"),
        (("chiar", "--data", "short"), "windows of 32 tokens; intervals need 4"),
        (("chiar", "--baseline", "soft"), "is a chiar model"),
        (("missing", "--csv", "no/folder/r.csv"), "r.csv: cannot be written"),  # said before a run is opened
        (("missing", "--json", "chiar"), "is a folder"),
        (("missing",), "no such folder"),
    ],
)
def test_what_cannot_be_measured_is_one_message(folder, arguments, problem):
    places = [folder / a if not a.startswith("--") else a for a in arguments]
    done = analyse(*places, *FEW, "--switches", 0, "--checkpoints", 0, code=2)
    text = " ".join(done.stderr.split())
    assert problem in text and text.count("error:") == 1


def test_a_baseline_that_learns_classes_is_refused(folder, tmp_path):
    """It has seen examples, and no windows of a text whose attention distances could be compared."""
    config = small_config(
        tmp_path,
        model={"kind": "baseline"},
        data={"train": [{"path": str(write_examples(tmp_path / "examples", 20))}], "validation": {}},
        task={"kind": "classification", "classes": 3},
        training={"steps": 1, "global_batch_size": 4, "micro_batch_size": 4},
    )
    pretrain(write_config(tmp_path / "config.yaml", config))
    done = analyse(folder / "chiar", *FEW, "--baseline", tmp_path / "run", code=2)
    assert "learns classes" in " ".join(done.stderr.split())


def test_a_baseline_of_shorter_sequences_is_refused(folder, tmp_path):
    shutil.copytree(folder / "baseline", tmp_path / "baseline")
    (*_, newest) = complete_checkpoints(tmp_path / "baseline" / "checkpoints")
    replace_in_config(newest, "max_sequence_length: 32", "max_sequence_length: 16")
    replace_in_config(newest, "sequence_length: null", "sequence_length: 16")
    done = analyse(folder / "chiar", *FEW, "--baseline", newest, code=2)
    assert "reads at most 16 tokens, and the windows have 32" in " ".join(done.stderr.split())


def test_values_do_not_depend_on_the_batch_size(folder, record):
    again = json.loads(
        analyse(folder / "chiar", *FEW, "--batch-size", 7, "--baseline", folder / "baseline", "--json", "-").stdout
    )
    for one, other in zip(record["findings"], again["findings"], strict=True):
        if one["section"] in ("value", "distance", "loss"):
            numbers = [(one[k], other[k]) for k in ("value", "low", "high") if one[k] is not None]
            for a, b in numbers:
                assert b == pytest.approx(a, rel=1e-2, abs=1e-4), one["measure"]
    assert np.isfinite(record["findings"][0]["value"])
