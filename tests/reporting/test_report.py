"""The report of real tiny runs: its numbers are those of their records, and what they lack is said and left out."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from browser import open_page, start_browser
from PIL import Image
from reported_runs import STEPS, make_runs

from megachiar.cli import report
from megachiar.config.identity import config_digest
from megachiar.config.sweep import load_sweep
from megachiar.errors import UserError
from megachiar.sweeps.cells import cell_named
from megachiar.training.run_result import read_result

NAMES = ("baseline/seed_1", "baseline/seed_2", "threshold/seed_1", "threshold/seed_2", "a/run", "b/run")
PROMPT = "Document 1: the <b>quick</b> & 100 % brown_fox"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_runs(folder)
    return folder


@pytest.fixture(scope="module")
def whole(runs) -> Path:
    """The report of all runs."""
    output = runs / "report"
    report.main([*(str(runs / name) for name in NAMES), "--output", str(output), "--prompt", PROMPT])
    return output


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def result(runs: Path, name: str) -> dict:
    return json.loads((runs / name / "results.json").read_text())


def records(runs: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


def test_the_main_table_has_the_numbers_of_the_results(runs, whole):
    found = {row["run"]: row for row in rows(whole / "tables" / "main.csv")}
    assert list(found) == list(NAMES)
    for name, row in found.items():
        of_run = result(runs, name)
        best, test = of_run["validation"]["valid"]["best"], of_run["test"]["held"]
        assert float(row["validation_loss"]) == best["loss"] and float(row["test_loss"]) == test["loss"]
        for measure in ("token_ppl", "word_ppl", "bits_per_byte", "accuracy", "macro_f1"):
            assert row[f"test_{measure}"] == ("" if test.get(measure) is None else repr(test[measure]))
        assert int(row["parameters"]) == of_run["parameters"] and row["kind"] == of_run["model"]
        assert row["tokens"] == ("" if of_run["tokens"] is None else str(of_run["tokens"]))
        assert float(row["training_seconds"]) == of_run["training_seconds"] and row["finished"] == "True"
        share = of_run["attention_share"]
        assert row["attention_share"] == ("" if share is None else repr(share))


def test_flops_are_those_of_each_layers_own_share(runs, whole):
    """Counted here by hand for d = 32, T = 32, 4 layers and a vocabulary of 400, with H of every row of two layers."""
    found = {row["run"]: row for row in rows(whole / "tables" / "main.csv")}
    d, seen, head, transform = 32, 33 / 2, 2 * 32 * 400, 2.5 * 32 * 5
    feed_forward = 4 * d * 4 * d
    dense = 4 * (8 * d * d + 4 * d * seen + feed_forward) + head
    assert float(found["baseline/seed_1"]["flops_per_token"]) == dense
    assert float(found["baseline/seed_1"]["flops_saved"]) == 0
    last = records(runs, "threshold/seed_1")
    (share,) = [r["attention_share"] for r in last if r["kind"] == "train" and r["step"] == STEPS]
    routed = 0.0
    for layer in (1, 2):  # keys of all tokens, queries of the routed ones
        routed += share[layer] * (4 * d * d + 4 * d * seen) + 4 * d * d + feed_forward
        routed += transform + (1 - share[layer]) * transform
    first = 2 * transform + 2 * d + feed_forward
    expected = first + routed + 8 * d * d + 4 * d * seen + feed_forward + head
    assert float(found["threshold/seed_1"]["flops_per_token"]) == pytest.approx(expected)
    assert float(found["threshold/seed_1"]["flops_saved"]) == pytest.approx(1 - expected / dense)


def test_every_set_of_every_task_is_there(runs, whole):
    found = {(row["run"], row["split"], row["set"]): row for row in rows(whole / "tables" / "sets.csv")}
    mixed = [r for r in records(runs, "a/run") if r["kind"] == "evaluation/kinds"][-1]
    assert float(found["a/run", "validation", "kinds"]["accuracy"]) == mixed["accuracy"]
    assert found["a/run", "validation", "kinds"]["data"] == str(runs / "kinds_valid")
    assert ("b/run", "test", "held") in found and len(found) == 2 * len(NAMES) + 1


def test_wikitext_2_and_classification_have_tables_of_their_own(whole):
    texts, labelled = rows(whole / "tables" / "wikitext2.csv"), rows(whole / "tables" / "classification.csv")
    assert {row["run"] for row in texts} == set(NAMES) - {"b/run"}
    assert {(row["run"], row["set"]) for row in labelled} == {("a/run", "kinds"), ("b/run", "valid"), ("b/run", "held")}
    assert all(row["macro_f1"] and row["accuracy"] for row in labelled) and all(row["word_ppl"] for row in texts)


def test_the_ablation_pairs_seeds(runs, whole):
    found = {row["variant"]: row for row in rows(whole / "tables" / "ablation.csv")}
    losses = {name: result(runs, name)["test"]["held"]["loss"] for name in NAMES}
    differences = [losses[f"threshold/seed_{seed}"] - losses[f"baseline/seed_{seed}"] for seed in (1, 2)]
    assert float(found["threshold"]["test_loss_difference_mean"]) == pytest.approx(sum(differences) / 2)
    assert found["baseline"]["seeds"] == "2" and found["a/run"]["seeds"] == "1"
    assert "b/run" not in found, "a loss of examples is no loss of tokens"
    assert float(found["baseline"]["test_loss_least"]) == min(losses["baseline/seed_1"], losses["baseline/seed_2"])


def test_continuations_are_those_of_generate(runs, whole, capsys):
    from megachiar.cli import generate

    (row,) = rows(whole / "tables" / "continuations.csv")
    assert row["prompt"] == PROMPT and set(row) == {"prompt", *NAMES} - {"b/run"}
    options = ["--prompt", PROMPT, "--max-new-tokens", "25", "--temperature", "0"]
    generate.main([str(runs / "threshold" / "seed_1"), *options])
    assert capsys.readouterr().out.rstrip("\n").endswith(row["threshold/seed_1"]) and row["threshold/seed_1"]


def test_routes_are_those_of_the_command_routes(runs, whole, capsys):
    from megachiar.cli import routes
    from megachiar.reporting.model_looks import TEXT

    routes.main([str(runs / "a" / "run"), "--text", TEXT, "--json"])
    record = json.loads(capsys.readouterr().out)
    found = rows(whole / "tables" / "routes_a_run.csv")
    assert len(found) == 4 * len(record["tokens"])
    for row in found:
        token, layer = record["tokens"][int(row["position"])], int(row["layer"]) - 1
        assert row["operator"] == record["operators"][token["operator"][layer]]
        assert float(row["entropy"]) == pytest.approx(token["entropy"][layer], abs=1e-5)


def test_latex_has_as_many_cells_in_every_row(whole):
    names = [path.stem for path in (whole / "tables").glob("*.csv") if not path.stem.startswith("routes_")]
    assert sorted(re.findall(r"\\input\{(\w+)\.tex\}", (whole / "tables" / "all_tables.tex").read_text())) == sorted(
        names
    )
    for name in names:
        content = (whole / "tables" / f"{name}.tex").read_text()
        (layout,) = re.findall(r"\\begin\{tabular\}\{(.*)\}$", content, re.M)
        columns = len(re.findall(r"[lr]|p\{[\d.]+cm\}", re.sub(r"p\{[\d.]+cm\}", "l", layout)))
        body = [line for line in content.splitlines() if line.endswith(r"\\")]
        bare = [re.sub(r"\\[&%$#_{}\\]", "", line[:-2]) for line in body]
        assert len(body) >= 2 and {line.count("&") for line in bare} == {columns - 1}, name
        assert all(line.count("{") == line.count("}") and not re.search("[%#_]", line) for line in bare), name
        assert content.isascii()


def test_every_figure_is_there_and_has_content(whole):
    found = {path.stem for path in (whole / "figures").glob("*.png")}
    shares = {f"attention_share_{name}" for name in ("threshold_seed_1", "threshold_seed_2", "a_run", "b_run")}
    heatmaps = {f"heatmap_{name}" for name in ("threshold_seed_1", "threshold_seed_2", "a_run")}
    curves = {"training_curves", "classification_curves", "accuracy", "learning_rate", "gate", "ablation"}
    assert found == shares | heatmaps | curves
    for path in (whole / "figures").glob("*.png"):
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20, path
            assert not {"Software", "Creation Time", "date"} & set(image.info)
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_the_page_opens_without_a_network_and_shows_every_figure(whole):
    figures = len(list((whole / "figures").glob("*.png")))
    with start_browser() as browser, open_page(browser, (whole / "report.html").as_uri()) as page:
        widths = page.evaluate("Array.from(document.images, image => image.naturalWidth)")
        assert len(widths) == figures and min(widths) > 300
        assert page.locator("table").count() == 6 and PROMPT in page.locator("#continuations").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        first = page.locator("img").first.get_attribute("src").partition(",")[2]
        assert base64.b64decode(first) in {path.read_bytes() for path in (whole / "figures").glob("*.png")}


def test_the_console_and_the_page_say_what_is_left_out(runs, whole, tmp_path, capsys):
    report.main([str(runs / "baseline" / "seed_1"), "--output", str(tmp_path / "r"), "--no-figures"])
    printed, page = capsys.readouterr().err, (tmp_path / "r" / "report.html").read_text()
    for line in (
        "table and figure ablation: fewer than two variants have finished runs",
        "table classification: no run was measured on a labelled set",
        "seed_1, heatmap: no layer of this model routes",
    ):
        assert line in printed and line in page
    assert "<img" not in page and not (tmp_path / "r" / "figures").exists()


def test_a_report_made_again_has_the_same_bytes(runs, tmp_path):
    def content(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    for name in ("one", "other"):
        report.main([str(runs / "a" / "run"), "--output", str(tmp_path / name)])
    assert content(tmp_path / "one") == content(tmp_path / "other")
    assert (tmp_path / "one" / "figures" / "heatmap_run.png").exists()
    report.main([str(runs / "b" / "run"), "--output", str(tmp_path / "one"), "--no-models", "--no-figures"])
    assert not (tmp_path / "one" / "figures" / "heatmap_run.png").exists(), "what it has no more is removed"


def test_damage_is_said_and_the_rest_is_shown(runs, tmp_path, capsys):
    run = tmp_path / "hurt"
    shutil.copytree(runs / "threshold" / "seed_1", run)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = [json.loads(line) | {"loss": 7.0} for line in lines if '"step": 2' in line]
    lines[1] = "{torn"
    (run / "metrics.jsonl").write_text("\n".join([*lines, *map(json.dumps, again)]) + '\n{"step": 9, "ki')
    (run / "results.json").write_text("{}")
    (run / "tokenizer" / "tokenizer.model").write_bytes(b"another one")
    report.main([str(run), "--output", str(tmp_path / "r"), "--no-figures"])
    printed = capsys.readouterr().err
    for expected in (
        r"hurt: 1 damaged lines of metrics\.jsonl are left out \(line 2\)",
        r"hurt: metrics\.jsonl has steps twice",
        r"results\.json: is no result of a run",
        r"hurt, continuations and heatmap: .*tokenizer",
    ):
        assert re.search(expected, printed), (expected, printed)
    (row,) = rows(tmp_path / "r" / "tables" / "main.csv")
    assert row["finished"] == "False" and row["step"] == "6", "the newest checkpoint tells how far it is"
    assert float(row["validation_loss"]) == 7.0, "the newest measurement"


def test_a_run_that_trains_shows_its_newest_measurement(runs, tmp_path, capsys):
    run = tmp_path / "trains"
    shutil.copytree(runs / "threshold" / "seed_1", run)
    (run / "results.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 5]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    report.main([str(run), "--output", str(tmp_path / "r"), "--no-figures", "--no-models"])
    (row,) = rows(tmp_path / "r" / "tables" / "main.csv")
    (newest,) = [r for r in records(tmp_path, "trains") if r["kind"] == "evaluation/valid" and r["step"] == 4]
    assert (row["step"], row["steps"], row["finished"], row["validation_step"]) == ("5", "6", "False", "4")
    assert float(row["validation_loss"]) == newest["loss"] and row["test_loss"] == "" and row["flops_per_token"]
    assert "5 of 6" in (tmp_path / "r" / "report.html").read_text()


def test_a_run_without_checkpoints_or_config_has_what_its_result_says(runs, tmp_path, capsys):
    run = tmp_path / "bare"
    run.mkdir()
    shutil.copy(runs / "baseline" / "seed_1" / "results.json", run)
    report.main([str(run), "--output", str(tmp_path / "r"), "--no-figures"])
    printed = capsys.readouterr().err
    assert "bare: has no config.yaml" in printed and "bare: has no metrics.jsonl" in printed
    (row,) = rows(tmp_path / "r" / "tables" / "main.csv")
    assert row["test_loss"] == repr(result(runs, "baseline/seed_1")["test"]["held"]["loss"])
    assert row["flops_per_token"] == ""


def test_an_older_config_is_one_line(runs, tmp_path, capsys):
    run = tmp_path / "old"
    run.mkdir()
    for name in ("results.json", "metrics.jsonl"):
        shutil.copy(runs / "threshold" / "seed_1" / name, run)
    config = yaml.safe_load((runs / "threshold" / "seed_1" / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"gone_since": 1}))
    report.main([str(run), "--output", str(tmp_path / "r"), "--no-figures"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "gone_since" in line]
    assert line.startswith("old: ")


def test_without_matplotlib_all_but_the_figures_is_written(runs, tmp_path, monkeypatch, capsys):
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.main([str(runs / "b" / "run"), "--output", str(tmp_path / "r"), "--no-models"])
    assert "pip install -c constraints.txt -e '.[report]'" in capsys.readouterr().err
    assert (
        not (tmp_path / "r" / "figures").exists() and "Classification" in (tmp_path / "r" / "report.html").read_text()
    )


def write_sweep(runs: Path, folder: Path) -> Path:
    """Write the sweep whose cells are the runs of two variants, and of one that has not begun."""
    variants = {name: {"set": {"training.steps": STEPS}} for name in ("baseline", "threshold", "late")}
    sweep = {
        "base": str(runs / "threshold-seed_1.yaml"),
        "folder": str(runs),
        "seeds": [1, 2],
        "reference": "threshold",
        "variants": variants,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False))
    return path


def collect_as_cell(runs: Path, sweep: Path, name: str, folder: Path) -> None:
    """Write the result of a run as that of the cell ``name``, with the config that this cell has."""
    held = read_result(runs / name)
    assert held is not None
    digest = config_digest(cell_named(load_sweep(sweep), name).config())
    copy = folder / "sweep" / f"{name}.json"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(held.model_copy(update={"config_digest": digest}).to_json())


def test_a_sweep_is_shown_by_its_cells_and_by_its_collected_results(runs, tmp_path, capsys):
    sweep = write_sweep(runs, tmp_path)
    report.main(["--sweep", str(sweep), "--output", str(tmp_path / "cells"), "--no-figures"])
    assert "2 of 6 cells have not begun" in capsys.readouterr().err
    for name in NAMES[:4]:
        collect_as_cell(runs, sweep, name, tmp_path / "findings")
    collected = ["--sweep", str(sweep), "--from", str(tmp_path / "findings"), "--no-figures"]
    report.main([*collected, "--output", str(tmp_path / "copies")])
    for name in ("cells", "copies"):
        found = rows(tmp_path / name / "tables" / "ablation.csv")
        assert [row["variant"] for row in found] == ["baseline", "threshold"]
        assert found[1]["test_loss_difference_mean"] == "" and float(found[0]["test_loss_difference_mean"])
    one, other = (rows(tmp_path / name / "tables" / "ablation.csv") for name in ("cells", "copies"))
    assert [row["test_loss_mean"] for row in one] == [row["test_loss_mean"] for row in other]
    shutil.copy(runs / "baseline/seed_1/results.json", tmp_path / "findings/sweep/baseline/seed_1.json")
    capsys.readouterr()
    report.main([*collected, "--output", str(tmp_path / "changed")])
    told = " ".join(capsys.readouterr().err.split())
    assert "baseline/seed_1: its result in" in told and "is left out: has another config" in told


def test_a_named_cell_is_shown_once(runs, tmp_path):
    sweep = write_sweep(runs, tmp_path)
    named = [str(runs / "threshold" / "seed_1"), str(runs / "threshold" / "x" / ".." / "seed_1")]
    (runs / "threshold" / "x").mkdir(exist_ok=True)
    report.main([*named, "--sweep", str(sweep), "--output", str(tmp_path / "r"), "--no-figures", "--no-models"])
    labels = [row["run"] for row in rows(tmp_path / "r" / "tables" / "main.csv")]
    assert labels == ["threshold/seed_1", "baseline/seed_1", "baseline/seed_2", "threshold/seed_2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no such folder"),
        (["."], "holds no run"),
        (["threshold/seed_1/checkpoints/step_00000006"], "is one checkpoint"),
        ([], "neither RUN nor --sweep"),
        (["threshold/seed_1", "--from", "x"], "no effect without --sweep"),
        (["threshold/seed_1", "--no-models", "--reference", "x"], "no finished run is of this variant"),
    ],
)
def test_a_wrong_command_line_writes_nothing(runs, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(runs)
    with pytest.raises(UserError, match=message):
        report.main([*arguments, "--output", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


def test_a_csv_has_one_form(whole):
    for path in (whole / "tables").glob("*.csv"):
        content = path.read_bytes()
        assert content.endswith(b"\n") and len({len(row) for row in csv.reader(io.StringIO(content.decode()))}) == 1
