"""The page of a run, in a real browser without a network: its numbers are those of the files of the run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from browser import background, open_page, start_browser
from support import forked_python, pretrain
from watched_runs import FIRST, STEPS, records_of, watched_config

from megachiar.cli.page import main
from megachiar.errors import UserError
from megachiar.monitoring.run_routes import TEXT
from megachiar.viewer.open_run import open_run

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror=hacked()> & \" ' \u2028 $title"


@pytest.fixture(scope="module")
def browser():
    with start_browser() as started:
        yield started


def page_of(run: Path) -> str:
    return (run / "index.html").as_uri()


def readout(page: Any, chart: str) -> dict[str, str]:
    """Return what stands above a chart, by the name of the curve or layer."""
    items = page.locator(f"#chart-{chart} .readout li:has(b)").all()
    return {item.locator("span:not(.swatch)").first.inner_text(): item.locator("b").inner_text() for item in items}


def test_curves_have_the_numbers_of_the_metrics_at_each_step(browser, trained):
    """The run has written the page itself; the arrow keys go from step to step."""
    train, held_out = records_of(trained, "train"), records_of(trained, "evaluation/valid")
    assert [record["step"] for record in train] == list(range(1, STEPS + 1))
    with open_page(browser, page_of(trained)) as page:
        assert readout(page, "loss") == {
            "train": f"{train[-1]['mean_loss']:.4f}",
            "valid": f"{held_out[-1]['loss']:.4f}",
        }
        page.locator("#chart-loss .plot").focus()
        page.keyboard.press("Home")
        for record in train:
            at = readout(page, "loss")
            assert at["train"] == f"{record['mean_loss']:.4f}", record["step"]
            before = [each for each in held_out if abs(each["step"] - record["step"]) <= 1]
            assert at["valid"] in {f"{each['loss']:.4f}" for each in before}
            said = page.locator("#chart-loss .plot").get_attribute("aria-valuetext")
            assert said.startswith(f"step {record['step']}: train {record['mean_loss']:.4f}, valid ")
            page.keyboard.press("ArrowRight")
        for chart, name, key in (("gradient_norm", "norm", "gradient_norm"), ("gate", "g", "gate")):
            page.locator(f"#chart-{chart} .plot").focus()
            page.keyboard.press("Home")
            assert readout(page, chart) == {name: f"{train[0][key]:.4f}"}
        assert readout(page, "throughput") == {"tokens a second": f"{train[-1]['tokens_per_second']:,.0f}"}
        mantissa, exponent = f"{train[-1]['learning_rate']:.3e}".split("e")
        assert readout(page, "learning_rate") == {"learning rate": f"{mantissa}e{int(exponent)}"}
        assert readout(page, "bits_per_byte") == {"valid": f"{held_out[-1]['bits_per_byte']:.4f}"}


def test_a_pointer_and_other_axes(browser, trained):
    train = records_of(trained, "train")
    with open_page(browser, page_of(trained)) as page:
        page.locator("#axes label", has_text="tokens").click()
        box = page.locator("#chart-loss .plot").bounding_box()
        page.mouse.move(box["x"] + 60, box["y"] + 90)  # the left end of the curve
        shown = page.locator("#chart-loss .readout").inner_text()
        assert f"tokens {train[0]['tokens']:,}" in shown and f"{train[0]['mean_loss']:.4f}" in shown
        page.mouse.move(box["x"] + box["width"] - 14, box["y"] + 90)
        shown = page.locator("#chart-loss .readout").inner_text()
        assert f"tokens {train[-1]['tokens']:,}" in shown and f"{train[-1]['mean_loss']:.4f}" in shown
        page.mouse.move(2, 2)
        assert "newest" in page.locator("#chart-loss .readout").inner_text()
        linear = page.locator("#chart-loss path").first.get_attribute("d")
        page.locator("#log").check()
        assert page.locator("#chart-loss path").first.get_attribute("d") != linear
        page.locator("#axes label", has_text="time").click()
        page.locator("#chart-loss .plot").focus()
        page.keyboard.press("End")
        assert re.search(r"time \d+", page.locator("#chart-loss .readout").inner_text())


def test_layers_have_one_chart_each_of_shares_and_of_entropy(browser, trained):
    train = records_of(trained, "train")
    with open_page(browser, page_of(trained)) as page:
        for chart, show in (
            ("attention_share", lambda value: f"{100 * value:.1f} %"),
            ("entropy", lambda value: f"{value:.4f}"),
        ):
            assert page.locator(f"#chart-{chart} canvas").count() == 1
            wanted = ["none" if value is None else show(value) for value in train[-1][chart]]
            assert readout(page, chart) == {f"layer {n}": value for n, value in enumerate(wanted, 1)}
            page.locator(f"#chart-{chart} .heat").focus()
            for key in ("Home", "ArrowRight", "ArrowDown", "ArrowDown"):
                page.keyboard.press(key)
            assert readout(page, chart) == {"layer 2": show(train[1][chart][1])}
            assert "step 2" in page.locator(f"#chart-{chart} .readout").inner_text()
        row = [round(255 * (0.04 + 0.96 * record["attention_share"][1])) for record in train]
        pixels = "canvas => [...canvas.getContext('2d').getImageData(0, 1, canvas.width, 1).data]"
        alphas = page.locator("#chart-attention_share canvas").evaluate(pixels)[3::4]
        assert alphas == pytest.approx(row, abs=1.01)


def test_config_changes_environment_and_events(browser, trained):
    with open_page(browser, page_of(trained)) as page:
        starts = page.locator("#starts .start")
        assert starts.count() == 2 and starts.nth(0).locator("tbody tr").count() == 0
        changed = [row.locator("td").all_inner_texts() for row in starts.nth(1).locator("tbody tr").all()]
        assert changed == [
            ["optimizer.learning_rate", "0.002", "0.001"],
            ["training.steps", str(FIRST), str(STEPS)],
        ]
        assert f"step {FIRST}" in starts.nth(1).inner_text() and "resumed" in starts.nth(1).inner_text()
        environment = dict(row.locator("th, td").all_inner_texts() for row in page.locator("#environment tr").all())
        assert environment["torch"] == torch.__version__ and environment["ranks"] == "1"
        assert environment["layout"] == "pp 1 x tp 1 x dp 1, ZeRO 1, fp32"
        events = page.locator("#events li span").all_inner_texts()
        assert events[0] == f"finished after step {STEPS}" and events[-1] == "started"
        assert [text.split(" in ")[0] for text in events if text.startswith("saved")] == [
            f"saved step {step}" for step in (12, 9, 6, 3)
        ]
        assert f"went on from step {FIRST}, 2 keys of the config changed" in events
        page.locator("summary").click()
        assert yaml.safe_load(page.locator("#config").inner_text()) == yaml.safe_load(
            (trained / "config.yaml").read_text()
        )
        assert page.locator("#about li").first.inner_text() == "finished"


def test_routes_are_those_of_the_model(browser, trained):
    """The run traced the model that it trained; here its last checkpoint is opened, and each colour compared."""
    run = open_run(trained, log=print)
    record = run.record(run.routes(run.encode(TEXT, "text")))
    with open_page(browser, page_of(trained)) as page:
        assert f"after step {STEPS}" in page.locator("#routes-note").inner_text()
        legend = {name: background(page, f"#legend [data-op={name}]") for name in record["operators"]}
        assert len(set(legend.values())) == 2
        for index in range(4):
            page.locator("#layer").fill(str(index + 1))
            tokens = page.locator("#tokens > span")
            colours = tokens.evaluate_all("all => all.map((token) => getComputedStyle(token).backgroundColor)")
            assert colours == [legend[record["operators"][token["operator"][index]]] for token in record["tokens"]]
            titles = tokens.evaluate_all("all => all.map((token) => token.title)")
            entropies = [float(title.rpartition(" H ")[2]) for title in titles]
            assert entropies == pytest.approx([token["entropy"][index] for token in record["tokens"]], abs=1.5e-4)
    taken = {token["operator"][layer] for token in record["tokens"] for layer in (1, 2)}
    assert taken == {0, 1}, "both operators occur"


def test_a_phone_and_both_colour_schemes(browser, trained):
    """Nothing is wider than the screen, and letters differ from what they stand on."""
    papers = set()
    for scheme, width in (("light", 390), ("dark", 390), ("light", 1280)):
        with open_page(
            browser, page_of(trained), color_scheme=scheme, viewport={"width": width, "height": 800}
        ) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            colours = page.evaluate(
                "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
            )
            assert len(set(colours)) == 2
            papers.add(colours[1])
            focused = []
            for _ in range(30):
                page.keyboard.press("Tab")
                focused.append(
                    page.evaluate("document.activeElement.getAttribute('role') ?? document.activeElement.id")
                )
            assert {"slider", "theme", "layer", "log"} <= set(focused), "all can be reached by keys"
    assert len(papers) == 2


def test_hostile_texts_stay_texts(browser, trained, tmp_path, capsys):
    """Samples, reasons and names reach the page as they are; damaged lines are told."""
    run = Path(shutil.copytree(trained, tmp_path / "a&<b>"))
    samples = [{"step": 4, "prompt": "older", "text": " one"}, {"step": 12, "prompt": "Once", "text": f" {HOSTILE}"}]
    (run / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 12, "kind": f"eval/{HOSTILE}", "acc": 0.25, "ppl": 31.5}) + "\n{damaged\n")
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": 1e9, "step": 12, "kind": "failed", "reason": HOSTILE}) + "\n")
    main([str(run), "--no-routes"])
    assert "wrote" in capsys.readouterr().err
    with open_page(browser, page_of(run)) as page:
        assert page.locator("h1").inner_text() == "a&<b>"
        assert HOSTILE.replace("\u2028", "") in page.locator(".sample").inner_text().replace("\u2028", "")
        assert page.locator(".sample").count() == 1, "of the newest step"
        assert list(readout(page, "tasks").values()) == ["0.2500"]
        assert list(readout(page, "task_values").values()) == ["31.5000"]
        assert HOSTILE[:40] in page.locator("#events .alarming").first.inner_text()
        assert page.evaluate("window.hacked") is None
        assert "1 damaged lines" in page.locator("#about").inner_text()
        assert page.locator("#routes-note").inner_text() == "not asked for"


def test_a_page_changes_no_run_and_its_failure_ends_none(trained):
    """Losses are equal bit for bit without a page; a folder in its place is one warning, and the run goes on."""
    folder = trained.parent
    config = watched_config(folder, "without", logging={"page": False})
    pretrain(config)
    assert not (folder / "without" / "index.html").exists()
    losses = [[record["loss"] for record in records_of(folder / name, "train")[:FIRST]] for name in ("run", "without")]
    assert losses[0] == losses[1]
    (folder / "without" / "index.html").mkdir()
    (output,) = pretrain(config, f"training.steps={FIRST + 4}", "logging.page=true")
    assert output.count("index.html was not written") == 1 and "is a folder" in output
    assert records_of(folder / "without", "train")[-1]["step"] == FIRST + 4


def test_a_shared_out_model_has_its_routes_from_a_checkpoint(trained):
    """Two ranks of tensor parallelism: the page says why it has no routes, and ``megachiar page`` adds them."""
    folder = trained.parent
    config = watched_config(folder, "shared", training={"steps": 2}, parallel={"tensor_size": 2})
    pretrain(config, ranks=2)
    note = "the model is shared out among ranks; `megachiar page RUN` shows them from a checkpoint"
    assert note in (folder / "shared" / "index.html").read_text()
    done = forked_python("-m", "megachiar", "page", folder / "shared")
    assert done.returncode == 0, done.stderr
    page = (folder / "shared" / "index.html").read_text()
    assert note not in page and '"operators":["dct","attention"]' in page


def test_other_files_are_not_replaced(trained, tmp_path):
    other = tmp_path / "index.html"
    other.write_text("<p>mine</p>")
    for arguments, problem in (
        ([trained, "--output", other], "exists already and is no page of a run"),
        ([trained, "--output", tmp_path], "is a folder"),
        ([trained, "--output", tmp_path / "no" / "page.html"], "there is no such folder"),
        ([tmp_path / "no"], "there is no such folder"),
    ):
        with pytest.raises(UserError) as raised:
            main([str(argument) for argument in arguments])
        assert problem in raised.value.problem
    assert other.read_text() == "<p>mine</p>"
