"""The quickstart's own logic, without the training it starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import quickstart


@pytest.fixture
def console():
    return Console(record=True, width=200)


def step(title: str, code: str, **more) -> quickstart.Step:
    return quickstart.Step(title, ["-c", code], **more)


def test_it_is_the_whole_way_in_order(monkeypatch):
    monkeypatch.chdir(ROOT)
    titles = [s.title for s in quickstart.steps()]
    assert titles == [
        "corpus",
        "tokenizer",
        "train data",
        "valid data",
        "test data",
        "training",
        "bigram",
        "evaluation",
        "sample",
    ]
    for s in quickstart.steps():
        program = s.arguments[0]
        assert program == "-m" or (ROOT / program).exists()


def test_steps_run_in_order_and_what_is_read_is_kept(tmp_path, console):
    log = tmp_path / "log"
    todo = [step("a", f"open({str(log)!r}, 'a').write('a')"), step("b", "print('out')", reads=True)]
    assert quickstart.run_steps(todo, console) == {"b": "out\n"}
    assert log.read_text() == "a"


def test_what_is_there_already_is_skipped(tmp_path, console):
    made = tmp_path / "made"
    todo = [step("a", f"open({str(made)!r}, 'a').write('x')", made=[made])]
    quickstart.run_steps(todo, console)
    quickstart.run_steps(todo, console)
    assert made.read_text() == "x"
    assert "there already" in console.export_text()


def test_the_first_failure_ends_it_with_its_code(tmp_path, console):
    log = tmp_path / "log"
    todo = [step("a", "raise SystemExit(7)"), step("b", f"open({str(log)!r}, 'w')")]
    with pytest.raises(quickstart.StepFailed) as failure:
        quickstart.run_steps(todo, console)
    assert failure.value.code == 7 and not log.exists()
    assert "a failed with exit code 7" in console.export_text()


@pytest.mark.parametrize(("ppl", "code"), [(50.0, 0), (70.0, 1)])
def test_the_summary_compares_and_says_where_to_look(ppl, code, console):
    outputs = {
        "bigram": json.dumps({"token_ppl": 60.0}),
        "evaluation": json.dumps({"token_ppl": ppl, "word_ppl": 900.0, "bits_per_byte": 2.0, "step": 9}),
        "sample": "To be",
    }
    assert quickstart.summarise(outputs, Path("runs/tiny"), console) == code
    text = console.export_text()
    assert "60.00" in text and f"{ppl:.2f}" in text and "tensorboard --logdir runs/tiny" in text and "To be" in text
