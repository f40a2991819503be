"""The quickstart's own logic, without the training it starts; the Makefile's refusals; the pinned versions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from support import ROOT, python

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from megachiar.cli import quickstart
from megachiar.errors import UserError

CONFIG = Path("configs/tiny.yaml")
BIGRAM = {"token_ppl": 60.0, "tokens": 1234}
MODEL = {"token_ppl": 50.0, "word_ppl": 900.0, "bits_per_byte": 2.0, "step": 9, "tokens": 1234}


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=200)


def step(title: str, code: str, **more) -> quickstart.Step:
    return quickstart.Step(title, ["-c", code], **more)


def test_it_is_the_whole_way_in_order():
    todo = quickstart.steps(CONFIG, 777, Path("runs/here"))
    data = ["train data", "valid data", "test data"]
    assert [s.title for s in todo] == ["corpus", "tokenizer", *data, "training", "bigram", "evaluation", "sample"]
    commands = {s.title: s.command for s in todo}
    assert commands["training"] == "megachiar pretrain --config configs/tiny.yaml"
    assert "--vocab-size 777" in commands["tokenizer"] and "--vocab-size 777" in commands["bigram"]
    assert commands["sample"].startswith("megachiar generate runs/here --prompt 'To be")


@pytest.mark.parametrize("step", quickstart.steps(CONFIG, 777, Path("runs/here")), ids=lambda s: s.title)
def test_every_command_exists_and_knows_its_flags(step):
    program = step.arguments[:3]
    done = python(*program, "--help")
    assert done.returncode == 0
    for flag in (a for a in step.arguments if a.startswith("--")):
        assert flag in done.stdout


def test_each_step_finds_what_the_earlier_ones_made():
    made: set[Path] = set()
    for s in quickstart.steps(CONFIG, 777, Path("runs/here")):
        assert set(s.source) <= made
        made |= set(s.made)


def test_steps_run_in_order_and_what_is_read_is_kept(tmp_path, console):
    log = tmp_path / "log"
    todo = [step("a", f"open({str(log)!r}, 'a').write('a')"), step("b", "print('out')", reads=True)]
    outputs, seconds = quickstart.run_steps(todo, console)
    assert outputs == {"b": "out\n"} and list(seconds) == ["a", "b"]
    assert log.read_text() == "a"
    assert "[2/2] b" in (text := console.export_text()) and f"$ {todo[1].command}" in text


def test_what_is_there_and_new_is_skipped(tmp_path, console):
    source, made = tmp_path / "source", tmp_path / "made"
    source.touch()
    todo = [step("a", f"open({str(made)!r}, 'a').write('x')", made=[made], source=[source])]
    for _ in range(2):
        quickstart.run_steps(todo, console)
    assert made.read_text() == "x"
    assert "there already, skipped" in console.export_text()
    os.utime(source, (made.stat().st_atime, made.stat().st_mtime + 10))
    quickstart.run_steps(todo, console)
    assert made.read_text() == "xx"


def test_a_step_with_one_result_missing_is_not_done(tmp_path):
    (tmp_path / "one").touch()
    assert step("a", "", made=[tmp_path / "one"]).done
    assert not step("a", "", made=[tmp_path / "one", tmp_path / "two"]).done
    assert not step("a", "").done


@pytest.mark.parametrize(
    ("code", "expected"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 15)", 143)]
)
def test_the_first_failure_ends_it_with_its_code_and_command(tmp_path, console, code, expected):
    log = tmp_path / "log"
    todo = [step("a", code), step("b", f"open({str(log)!r}, 'w')")]
    with pytest.raises(quickstart.StepFailed) as failure:
        quickstart.run_steps(todo, console)
    assert failure.value.code == expected and not log.exists()
    text = console.export_text()
    assert f"[1/2] a failed with exit code {expected}: {todo[0].command}" in text and "goes on from here" in text


@pytest.mark.parametrize(("ppl", "code"), [(50.0, 0), (60.0, 1), (70.0, 1)])
def test_the_summary_compares_and_says_where_to_look(ppl, code, console):
    sample = "To be [exit] [/b] [bold]loud[/bold]"
    outputs = {"bigram": json.dumps(BIGRAM), "evaluation": json.dumps({**MODEL, "token_ppl": ppl}), "sample": sample}
    assert quickstart.summarise(outputs, {"training": 61.0}, CONFIG, Path("runs/tiny"), console) == code
    text = console.export_text()
    assert sample in text, "stage directions are not markup"
    assert "60.00" in text and f"{ppl:.2f}" in text and "1,234 tokens" in text and "training 61 s" in text
    assert "tensorboard --logdir runs" in text and "runs/tiny/metrics.jsonl" in text and "README.md" in text
    assert ("no better than the bigram" in text) == bool(code)


def test_the_bigrams_other_numbers_follow_from_its_perplexity(console):
    """50**2 = 2500: twice the nats a token, so twice the bits a byte, and the square of the word perplexity."""
    console.print(quickstart.results_table({"token_ppl": 2500.0}, MODEL))
    row = next(line for line in console.export_text().splitlines() if "interpolated bigram" in line)
    assert re.findall(r"[\d,.]+", row) == ["2500.00", "4.000", "810,000"]


def test_models_scored_on_other_tokens_are_not_compared(console):
    outputs = {"bigram": json.dumps({**BIGRAM, "tokens": 1233}), "evaluation": json.dumps(MODEL), "sample": ""}
    with pytest.raises(UserError, match="scored on 1,233 tokens, the model on 1,234"):
        quickstart.summarise(outputs, {}, CONFIG, Path("runs/tiny"), console)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as its own start, also where `make test` started these tests."""
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def fake_python(path: Path, old: bool) -> Path:
    """An interpreter that is too old, or one that lacks ensurepip, as Debian's without python3-venv does."""
    refused = "version_info" if old else "ensurepip"
    cases = f"*{refused}*) exit 1;; *--version*) echo Python 3.8.1; exit;;"
    path.write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\nexec {sys.executable} "$@"')
    path.chmod(0o755)
    return path


def test_make_refuses_a_python_that_is_missing_too_old_or_without_venv(tmp_path):
    venv = f"VENV={tmp_path / 'venv'}"
    missing = make("quickstart", venv, "PYTHON=no-such-python")
    assert missing.returncode == 2 and "error: there is no no-such-python" in missing.stderr
    old = make("test", venv, f"PYTHON={fake_python(tmp_path / 'old', old=True)}")
    assert old.returncode == 2 and "is older than 3.10 (Python 3.8.1)" in old.stderr
    bare = make("test-slow", venv, f"PYTHON={fake_python(tmp_path / 'bare', old=False)}")
    assert bare.returncode == 2 and "apt install python3-venv" in bare.stderr
    assert not (tmp_path / "venv").exists()


def test_make_takes_the_pinned_versions_once(tmp_path):
    plan = make("--dry-run", "test", f"VENV={tmp_path / 'venv'}").stdout
    assert f"{tmp_path / 'venv'}/bin/python -m pip install -c constraints.txt -e '.[dev]'" in plan
    assert f"{tmp_path / 'venv'}/bin/python -m pytest" in plan
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", "installed", "installed-dev"):
        (tmp_path / "venv" / name).touch()
    plan = make("--dry-run", "test", f"VENV={tmp_path / 'venv'}").stdout
    assert "pip install" not in plan and "-m pytest" in plan


def pins() -> dict[str, list[Requirement]]:
    """Return the pins of each package, of which each Python takes at most one."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            assert re.fullmatch(r"==[0-9][\w.]*", str(pin.specifier)), line
            found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def holds(requirement: Requirement, python: str) -> bool:
    """Whether a requirement or pin is one of that Python; extras count as asked for."""
    return requirement.marker is None or requirement.marker.evaluate({"python_version": python, "extra": ""})


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_is_pinned_once_for_each_python(python):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    names = {canonicalize_name(r.name) for r in map(Requirement, texts) if holds(r, python)}
    assert len(names) > 15
    pinned = {name: sum(holds(pin, python) for pin in found) for name, found in pins().items()}
    assert max(pinned.values()) == 1
    assert {name for name in names if not pinned.get(name)} == {"triton"}, "triton is pinned by each build of torch"


def test_what_the_requirements_require_is_pinned_too():
    """Of the packages that are installed here; those of an extra that is not are left to a machine that has it."""
    left_open = re.compile(r"triton|nvidia-.*|cuda-.*|megachiar")
    todo, seen = [("megachiar", extra) for extra in metadata("megachiar").get_all("Provides-Extra")], set()
    while todo:
        name, extra = todo.pop()
        if (name, extra) in seen or (left_open.fullmatch(name) and name != "megachiar"):
            continue
        seen.add((name, extra))
        try:
            found = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:
            continue
        for requirement in found:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(requirement.name), more) for more in requirement.extras or ("",)]
    assert len({name for name, _ in seen}) > 50
    assert {name for name, _ in seen} - set(pins()) == {"megachiar"}
