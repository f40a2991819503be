"""The files beside the package that people and tools read: what they name is there."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml
from support import ROOT

from megachiar.cli.main import COMMANDS

PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    text = (ROOT / page).read_text()
    commands = re.findall(r"`megachiar ([a-z][a-z-]*)[^`]*`", text)
    assert commands and set(commands) <= set(COMMANDS)
    for path in re.findall(r"`((?:tests|tools|megachiar|configs|\.ci)/[\w./]*)`", text):
        assert (ROOT / path).exists() or "NAME" in path, path


def test_the_changelog_keeps_its_form():
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    sections = [line for line in lines if line.startswith("## ")]
    assert sections[0] == "## [Unreleased]"
    assert all(re.fullmatch(r"## \[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", section) for section in sections[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert {line[4:] for line in lines if line.startswith("### ")} <= kinds


def test_the_citation_names_software_and_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["title"].startswith("megachiar") and citation["authors"]
    (paper,) = citation["references"]
    assert "2606.08327" in paper["identifiers"][0]["value"] and paper["url"] in (ROOT / "README.md").read_text()


def test_hooks_are_of_the_environment_alone():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        words = shlex.split(hook["entry"])
        assert words[0] in ("ruff", "mypy", "python")
        for path in (word for word in words if word.startswith("tests/")):
            assert (ROOT / path).exists()


def test_the_image_is_built_from_files_that_are_there():
    text = (ROOT / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()]
    assert {"megachiar", "configs", "pyproject.toml", "constraints.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists()
    assert not re.search(r"https?://", text)
