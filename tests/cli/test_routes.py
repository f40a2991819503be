"""`megachiar routes` shows the routes of a run as text, JSON and a page, and says in one message what it refuses."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest
import torch
from model_cases import ROUTERS
from rich.console import Console
from routed_runs import TEXT, described_routes, make_run, record_of
from support import ROOT, forked_python, process_environment

from megachiar.analysis.route_trace import trace_routes
from megachiar.inference.loading import load_for_inference
from megachiar.viewer.terminal import MARKS, STYLES, print_routes

TOOL = "tools/show_routes.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder)
    make_run(folder, name="baseline", kind="baseline")
    return folder


def routes(*arguments: object, code: int = 0, stdin: str | None = None) -> str:
    if stdin is None:
        done = forked_python(TOOL, *arguments)
    else:
        command = [sys.executable, "-m", "megachiar", "routes", *map(str, arguments)]
        done = subprocess.run(
            command, cwd=ROOT, env=process_environment(), input=stdin.encode(), capture_output=True, timeout=240
        )
        done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize("step", [1, 2])
def test_json_has_what_the_model_of_the_step_did(folder, step):
    found = json.loads(routes(folder / "run", "--text", "the quick brown fox", "--json", "--step", step))
    config, model, _ = load_for_inference(folder / "run" / "checkpoints" / f"step_{step:08d}")
    trace = trace_routes(model, torch.tensor([[token["id"] for token in found["tokens"]]]))
    assert found["step"] == step and found["operators"] == list(config.model.router.operators)
    for place, token in enumerate(found["tokens"]):
        assert token["operator"] == trace.operator[:, 0, place].tolist()
        assert token["entropy"] == pytest.approx(trace.entropy[:, 0, place].tolist(), abs=1e-6)
    assert "".join(token["text"] for token in found["tokens"]) == "the quick brown fox"


def test_a_file_and_standard_input_are_read(folder, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    by_file = json.loads(routes(folder / "run", "--file", tmp_path / "text", "--json"))
    by_text = json.loads(routes(folder / "run", "--text", TEXT, "--json"))
    by_pipe = json.loads(routes(folder / "run", "--text", "-", "--json", stdin=f"{TEXT}\n"))
    assert by_file["tokens"] == by_text["tokens"] == by_pipe["tokens"]
    assert len(by_file["windows"]) > 1


def test_a_page_is_written_and_written_again(folder, tmp_path):
    page = tmp_path / "routes.html"
    for _ in range(2):
        assert routes(folder / "run", "--text", "the fox", "--html", page) == ""
    record = json.loads(page.read_text().split('id="record">')[1].split("</script>")[0])
    assert "".join(token["text"] for token in record["tokens"]) == "the fox"
    both = json.loads(routes(folder / "run", "--text", "the fox", "--html", page, "--json"))
    assert both["tokens"]


def test_text_has_marks_where_there_is_no_terminal(folder):
    printed = routes(folder / "run", "--text", "the quick brown fox", "--layer", 1, 4)
    assert "\x1b" not in printed
    first, last = printed.split("layer 4, ")
    assert "DCT mixing for every token\nthe quick brown fox\n" in first
    marked = last.splitlines()[1]
    assert re.sub(r"[][]", "", marked) == "the quick brown fox" and marked.startswith("[") and marked.endswith("]")
    baseline = routes(folder / "baseline", "--text", "the quick brown fox")
    assert "layer 1, attention for every token" in baseline and "[the]" in baseline.replace("][", "")


def shown(record, layers, **console) -> str:
    output = io.StringIO()
    print_routes(Console(file=output, width=100, **console), record, layers)
    return output.getvalue()


@pytest.mark.parametrize("kind", ["threshold three", "hard three", "random three", "soft three"])
def test_a_terminal_shows_each_token_in_the_colour_of_its_operator(tmp_path, kind):
    from rich.color import Color
    from rich.style import Style

    routes_, config, _ = described_routes(tmp_path, "the old ships sail home & rest", router=ROUTERS[kind])
    record = record_of(routes_, config)
    printed = shown(record, [2], force_terminal=True, color_system="truecolor", _environ={})
    line = printed.split("layer 2, ")[1].splitlines()[1]
    pieces = re.findall(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", line)
    assert [text for _, text in pieces] == [token["text"] for token in record["tokens"]]
    for (codes, _), token in zip(pieces, record["tokens"], strict=True):
        wanted = Style.parse(STYLES[record["operators"][token["operator"][1]]]).bgcolor
        assert isinstance(wanted, Color) and "48;2;{};{};{}".format(*wanted.get_truecolor()) in codes
    plain = shown(record, [2], force_terminal=True, no_color=True, _environ={})
    for name in {record["operators"][token["operator"][1]] for token in record["tokens"]}:
        assert all(mark in plain for mark in MARKS[name]), "without colours there are marks"


def test_a_text_cannot_steer_the_terminal(tmp_path):
    routes_, config, _ = described_routes(tmp_path, "a\x1b[31mb\x07\x9b2J\u202e [bold]c[/]")
    for console in ({"force_terminal": True, "color_system": "truecolor"}, {}):
        printed = shown(record_of(routes_, config, "runs/\x1b[2J[red]"), [2], **console)
        left = re.sub(r"\x1b\[[\d;]*m", "", printed)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", left)
        assert "bold" in left.replace("[", "").replace("]", "") and "[red]" in left


def test_notes_say_what_a_reader_must_know(tmp_path):
    def printed(**model) -> str:
        routes_, config, _ = described_routes(tmp_path, **model)
        return " ".join(shown(record_of(routes_, config), [2]).split())

    assert "windows of at most 16 tokens" in printed() and "fewer FLOPs in the operators" in printed()
    assert "largest gate" in printed(router=ROUTERS["soft"])
    assert "more FLOPs" in printed(router=ROUTERS["soft three"], num_layers=8)
    assert "is a control: it throws a coin" in printed(router=ROUTERS["random"])
    assert "is a control: it decides by H of the channels in another order" in printed(router=ROUTERS["hashed"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--text: is missing"),
        (["--text", "a", "--file", "b"], "--text: does not go with --file"),
        (["--text", ""], "--text: has no tokens"),
        (["--text", "a", "--layer", "5"], "--layer 5: the model has 4 layers"),
        (["--text", "a", "--layer", "0"], "0 is not at least 1"),
        (["--text", "a", "--step", "9"], "--step 9: "),
        (["--file", "{folder}/nothing"], "nothing: "),
        (["--file", "{folder}/latin"], "latin: byte 3: is no UTF-8"),
        (["--text", "a", "--html", "{folder}/latin"], "is no page of routes"),
        (["--text", "a", "--html", "{folder}/nowhere/a.html"], "there is no such folder"),
        (["--txt", "a"], "did you mean --text?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_it_refuses_is_one_message(folder, arguments, message):
    (folder / "latin").write_bytes(b"abc\xfc")
    said = routes(folder / "run", *(argument.format(folder=folder) for argument in arguments), code=2)
    assert message in " ".join(said.split()) and said.startswith("error: ") and said.count("error: ") == 1
