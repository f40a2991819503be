"""``megachiar compare``: its numbers are those of the runs' files, and it says where they do not compare."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from browser import open_page, start_browser
from support import pretrain
from text_helpers import train
from watched_runs import FIRST, STEPS, records_of, watched_config

from megachiar.cli import preprocess
from megachiar.cli.compare import main
from megachiar.data.storage.sealed_json import pretty_sealed
from megachiar.errors import UserError


@pytest.fixture(scope="module")
def second(trained: Path) -> Path:
    """A run of a baseline on the same data, at fewer steps."""
    pretrain(watched_config(trained.parent, "second", model={"kind": "baseline", "router": {}}))
    return trained.parent / "second"


def compared(*runs: Path, capsys) -> dict:
    capsys.readouterr()  # what was printed before
    main([*map(str, runs), "--json"])
    return json.loads(capsys.readouterr().out)


def test_numbers_are_those_of_the_files(trained, second, capsys, tmp_path):
    found = compared(trained, second, capsys=capsys)
    for run, row in zip((trained, second), found["runs"], strict=True):
        train_records, losses = records_of(run, "train"), records_of(run, "evaluation/valid")
        result = json.loads((run / "results.json").read_text())
        best = min(losses, key=lambda record: record["loss"])
        assert row["run"] == run.name and row["parameters"] == result["parameters"]
        assert (row["best_validation_loss"], row["best_validation_step"]) == (best["loss"], best["step"])
        assert row["last_validation_loss"] == losses[-1]["loss"]
        assert row["last_validation_bits"] == losses[-1]["bits_per_byte"]
        assert row["tokens"] == train_records[-1]["tokens"] and row["flops"] == train_records[-1]["flops"]
        rates = sorted(record["tokens_per_second"] for record in train_records[len(train_records) // 2 :])
        assert row["tokens_per_second"] == pytest.approx((rates[(len(rates) - 1) // 2] + rates[len(rates) // 2]) / 2)
        assert row["seconds"] == train_records[-1]["elapsed_seconds"]
    assert found["config"]["training.steps"] == {"run": STEPS, "second": FIRST}
    assert found["config"]["model.kind"] == {"run": "chiar", "second": "baseline"}
    assert "logging.folder" not in found["config"] and "training.seed" not in found["config"]
    (warning,) = found["warnings"]
    assert "different numbers of tokens" in warning

    main([str(trained), str(second), "--csv", str(tmp_path / "runs.csv")])
    shown = capsys.readouterr()
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    for row, values in zip(rows, found["runs"], strict=True):
        assert float(row["last_validation_loss"]) == values["last_validation_loss"] and row["run"] == values["run"]
    for text in ("best validation loss", f"{found['runs'][0]['best_validation_loss']:.4f}", "training.steps"):
        assert text in shown.out
    assert "different numbers of tokens" in shown.err


def test_the_page_has_the_curves_of_both_runs(trained, second, tmp_path):
    path = tmp_path / "compared.html"
    main([str(trained), str(second), "--html", str(path)])
    with start_browser() as browser, open_page(browser, path.as_uri(), viewport={"width": 390, "height": 800}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("h1").inner_text() == "run · second"
        assert "different numbers of tokens" in page.locator("#warnings").inner_text()
        for chart, kind, key in (("loss", "train", "mean_loss"), ("loss-valid", "evaluation/valid", "loss")):
            items = page.locator(f"#chart-{chart} .readout li:has(b)").all()
            shown = {
                item.locator("span:not(.swatch)").first.inner_text(): item.locator("b").inner_text() for item in items
            }
            assert shown == {run.name: f"{records_of(run, kind)[-1][key]:.4f}" for run in (trained, second)}
        page.locator("#axes label", has_text="FLOPs").click()
        page.locator("#chart-loss .plot").focus()
        page.keyboard.press("Home")
        first = min(records_of(run, "train")[0]["flops"] for run in (trained, second))
        said = page.locator("#chart-loss .plot").get_attribute("aria-valuetext")
        assert said.startswith(f"flops {first / 1e6:.3g}M")
        rows = {row.locator("th").inner_text(): row for row in page.locator("#numbers tbody tr").all()}
        best = min((trained, second), key=lambda run: records_of(run, "evaluation/valid")[-1]["loss"])
        assert (
            rows["last validation loss"].locator("b").inner_text()
            == f"{records_of(best, 'evaluation/valid')[-1]['loss']:.4f}"
        )
        assert page.locator("#differences tbody tr", has_text="model.kind").locator("td").all_inner_texts() == [
            "chiar",
            "baseline",
        ]
    main([str(trained), str(second), "--html", str(path)])  # a page of ours is replaced


def test_losses_of_other_data_or_tokenizers_have_no_best_one(trained, second, tmp_path, capsys):
    folder = trained.parent
    other = watched_config(folder, "other_data", data={"validation": {"valid": str(folder / "other")}})
    pretrain(other)
    found = compared(second, folder / "other_data", capsys=capsys)
    assert any("validation data of the runs differ" in warning for warning in found["warnings"])
    main([str(second), str(folder / "other_data"), "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "(does not compare)" in page
    rows = json.loads(page.split('id="record">')[1].split("</script>")[0])["rows"]
    assert {row["name"]: row["best"] for row in rows}["last validation loss"] is None

    (tmp_path / "tokenizer").mkdir()
    tokenizer = train(tmp_path / "tokenizer", "huggingface", 320)
    for part in ("train", "valid"):
        shutil.copy(folder / f"{part}.jsonl", tmp_path)
        common = ["--append-eod", "--workers", "1", "--output-prefix", str(tmp_path / part)]
        preprocess.main(["--input", str(tmp_path / f"{part}.jsonl"), "--tokenizer", str(tokenizer), *common])
    pretrain(watched_config(tmp_path, "third"))
    found = compared(second, tmp_path / "third", capsys=capsys)
    (warning,) = [warning for warning in found["warnings"] if "tokenizers" in warning]
    assert "losses and perplexities a token do not compare. Compare bits per byte" in warning
    sizes = [
        record["loss"] * record["tokens"] / math.log(2) / record["bits_per_byte"]
        for run in (second, tmp_path / "third")
        for record in records_of(run, "evaluation/valid")[-1:]
    ]
    assert sizes[0] == pytest.approx(sizes[1]), "the text is the same"


def test_an_evaluation_that_is_not_finite_is_not_hidden_by_the_one_before(trained, second, tmp_path, capsys):
    """The last validation loss of a run that has diverged is nan, and the other run's is the only finite one."""
    diverged = Path(shutil.copytree(second, tmp_path / "diverged"))
    records = [json.loads(line) for line in (diverged / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["step"] == FIRST:
            record |= dict.fromkeys({"loss", "mean_loss", "bits_per_byte"} & record.keys())
    (diverged / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = compared(trained, diverged, capsys=capsys)["runs"][1]
    assert found["last_validation_loss"] is None and found["best_validation_step"] < FIRST
    main([str(trained), str(diverged), "--html", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    shown = json.loads(page.split('id="record">')[1].split("</script>")[0])
    rows = {row["name"]: row for row in shown["rows"]}
    assert rows["last validation loss"]["cells"][1] == "nan" and rows["last validation loss"]["best"] is None
    lost = {series["name"]: series["is_lost"] for series in shown["charts"][0]["series"]}
    assert lost == {"run": False, "diverged": True}


def test_tasks_have_rows_and_charts_whose_best_one_is_known(trained, second, tmp_path, capsys):
    """A checkpoint tells which measures are best at their highest; tasks that were asked otherwise have no best one."""
    runs = [Path(shutil.copytree(run, tmp_path / run.name)) for run in (trained, second)]
    measures = ({"acc": 0.25, "ppl": 31.5}, {"acc": 0.75, "ppl": 30.0})
    for run, values in zip(runs, measures, strict=True):
        with open(run / "metrics.jsonl", "a") as file:
            earlier = {"step": 2, "kind": "eval/cloze", "acc": 0.0, "ppl": 99.0}
            newest = {"step": FIRST, "kind": "eval/cloze", **values}
            file.writelines(json.dumps(record) + "\n" for record in (earlier, newest))
    result = json.loads((runs[0] / "results.json").read_text())
    del result["seal"]
    for name, is_higher in (("acc", True), ("ppl", False)):
        best = {"value": measures[0][name], "step": FIRST, "higher_is_better": is_higher}
        result["best_of_each"][f"eval/cloze/{name}"] = best
    (runs[0] / "results.json").write_bytes(pretty_sealed(result))
    page = tmp_path / "page.html"
    main([*map(str, runs), "--html", str(page), "--csv", str(tmp_path / "runs.csv")])
    assert "last cloze/acc" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [(float(row["eval/cloze/acc"]), float(row["eval/cloze/ppl"])) for row in rows] == [
        (0.25, 31.5),
        (0.75, 30.0),
    ]
    with start_browser() as browser, open_page(browser, page.as_uri()) as shown:
        for name, best in (("acc", "0.7500"), ("ppl", "30.0000")):
            row = shown.locator("#numbers tbody tr", has_text=f"last cloze/{name}")
            assert row.locator("b").all_inner_texts() == [best]
            values = shown.locator(f"[id='chart-tasks-cloze/{name}'] .readout b").all_inner_texts()
            assert values == [f"{each[name]:.4f}" for each in measures]
    for run, limit in zip(runs, (None, 6), strict=True):
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["evaluation"] |= {"tasks": ["cloze"], "limit": limit}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    found = compared(*runs, capsys=capsys)
    assert "evaluation.limit is not set and 6: what tasks measure does not compare." in found["warnings"]


def test_validation_data_that_is_not_known_or_partly_read_has_no_best_one(trained, second, tmp_path, capsys):
    """Before its first checkpoint a run tells its data by the config alone; records tell how much of it was read."""
    early = Path(
        shutil.copytree(second, tmp_path / "early", ignore=shutil.ignore_patterns("checkpoints", "results.json"))
    )
    assert not any("validation" in warning for warning in compared(trained, early, capsys=capsys)["warnings"])
    config = (early / "config.yaml").read_text()
    (early / "config.yaml").write_text(config.replace(str(trained.parent / "valid"), str(trained.parent / "other")))
    (warning,) = [line for line in compared(trained, early, capsys=capsys)["warnings"] if "valid" in line]
    assert warning.startswith("No checkpoint tells yet what early is validated on, and data.validation differs")

    part = Path(shutil.copytree(second, tmp_path / "part"))
    lines = (part / "metrics.jsonl").read_text().replace('"complete": true', '"complete": false')
    tokens = records_of(second, "evaluation/valid")[-1]["tokens"]
    (part / "metrics.jsonl").write_text(lines.replace(f'"tokens": {tokens},', f'"tokens": {tokens // 2},'))
    main([str(trained), str(part), "--html", str(tmp_path / "page.html")])
    assert "validated on different parts of one text" in capsys.readouterr().err
    rows = json.loads((tmp_path / "page.html").read_text().split('id="record">')[1].split("</script>")[0])["rows"]
    assert {row["name"]: row["best"] for row in rows}["last validation loss"] is None


def test_one_run_or_none_is_refused(trained, tmp_path):
    for arguments, problem in (
        ([trained], "is one run"),
        ([trained, trained], "is one run"),
        ([trained, tmp_path / "no"], "there is no such folder"),
        ([trained, tmp_path], "holds no run"),
    ):
        with pytest.raises(UserError) as raised:
            main([str(argument) for argument in arguments])
        assert problem in raised.value.problem
