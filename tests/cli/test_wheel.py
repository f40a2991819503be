"""The wheel holds the package, the configs and nothing else; what it installs works away from the checkout."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT, process_environment

import megachiar
from megachiar.cli.main import COMMANDS

SOURCES = ("megachiar", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
"""What a wheel is made from."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built without a network: what builds it is installed here. From a copy, since setuptools reuses its build/."""
    copy, output = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, copy / name)
    build = ["-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "-w", output, copy]
    done = subprocess.run([sys.executable, *build], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = output.iterdir()
    return path


def test_it_holds_the_package_and_the_configs_and_nothing_else(wheel):
    assert wheel.name == f"megachiar-{megachiar.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        shipped = {name: archive.read(name) for name in held if name.startswith("megachiar/configs/")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megachiar").rglob("*.py")}
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "megachiar" / "viewer").glob("page.*")}
    page |= {f"megachiar/viewer/{name}" for name in ("elements.js", "panels.js", "live.js", "base.css", "parts.css")}
    page |= {
        f"megachiar/monitoring/{name}"
        for name in ("run.html", "compare.html", "charts.css", "charts.js", "run.js", "compare.js")
    }
    page |= {"megachiar/reporting/page.css"}
    assert len(page) == 16 and held == modules | {"megachiar/py.typed"} | page | set(shipped)
    configs = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    assert {path.parent.name for path in configs} == {"configs", "published", "sweeps"}
    assert shipped == {f"megachiar/{path.relative_to(ROOT)}": path.read_bytes() for path in configs}


def test_its_metadata_is_what_an_index_shows(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    head, _, description = text.partition("\n\n")
    for line in (
        "Name: megachiar",
        f"Version: {megachiar.__version__}",
        "License-Expression: MIT",
        "License-File: LICENSE",
    ):
        assert line in head.splitlines()
    assert {"cpu", "gpu", "dev"} < set(re.findall(r"^Provides-Extra: (\w+)$", head, re.M))
    assert "Project-URL" not in head and description.strip() == (ROOT / "README.md").read_text().strip()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_it_installs_works_away_from_the_checkout(wheel, tmp_path):
    """A new environment with what pip gets there, and the first commands of a newcomer in an empty folder."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    programs, folder = tmp_path / "venv" / "bin", tmp_path / "folder"
    folder.mkdir()
    env = process_environment(PATH=f"{programs}:/usr/bin:/bin")
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        env.pop(name, None)

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    run(programs / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    assert run("megachiar", "--version").stdout == f"megachiar {megachiar.__version__}\n"
    for command in COMMANDS:
        assert f"usage: megachiar {command} " in run("megachiar", command, "--help").stdout
    run("megachiar", "config", "init", "tiny")
    run("megachiar", "corpus", "--output", "data/shakespeare")
    data = ("--input", "data/shakespeare/valid.jsonl", "--tokenizer", "data/shakespeare/tokenizer.model")
    run("megachiar", "tokenizer", *data[:2], "--vocab-size", 2048, "--output", data[3])
    for part in ("train", "valid"):
        run("megachiar", "preprocess", *data, "--append-eod", "--output-prefix", f"data/shakespeare/{part}")
    shown = run("megachiar", "pretrain", "--config", "tiny.yaml", "--dry-run")
    assert "not checked" not in shown.stdout + shown.stderr, "the config found the data in the folder of its user"
    run("python", "-m", "megachiar", "pretrain", "--config", "tiny.yaml", "--training.steps=2")
    assert (folder / "runs" / "tiny" / "metrics.jsonl").exists()
