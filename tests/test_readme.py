"""Every command of the README works: each ```bash block says, in a comment above it, how it is tested.

<!-- test: run -->         executed word for word, in order, in one clone of the working tree (slow set)
<!-- test: quickstart -->  a make target that ``test_quickstart_for_real`` executes (slow set)
<!-- test: make -->        a make target that exists; running it here would run these tests again
<!-- test: cluster -->     commands for GPUs, clusters or a network: parsed, and all they name must exist
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, process_environment, python

from megachiar.config import load_config

README = ROOT / "README.md"
KINDS = {"run", "quickstart", "make", "cluster"}
BLOCK = re.compile(r"(?:<!-- test: (?P<kind>\w+) -->\n)?```bash\n(?P<commands>.*?)```", re.DOTALL)


def blocks(text: str) -> list[tuple[str | None, str]]:
    """(kind, commands) of each bash block; kind is None without a marker."""
    return [(match["kind"], match["commands"]) for match in BLOCK.finditer(text)]


def of_kind(kind: str) -> list[str]:
    return [commands for found, commands in blocks(README.read_text()) if found == kind]


def commands_of(block: str) -> list[list[str]]:
    """Words of each command of a block, continuation lines joined, ``a && b`` taken apart."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines for part in line.split("&&") if part.strip()]


def clone(folder: Path) -> Path:
    """The working tree as a stranger gets it: the files that git knows, changes included."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def test_every_block_says_how_it_is_tested():
    found = blocks(README.read_text())
    assert len(found) >= 8
    assert {kind for kind, _ in found} == KINDS


def test_a_block_without_marker_is_seen():
    assert blocks("text\n```bash\nls\n```\n") == [(None, "ls\n")]


def test_make_targets_exist():
    for block in of_kind("make") + of_kind("quickstart"):
        for words in commands_of(block):
            assert words[0] == "make"
            done = subprocess.run(["make", "--dry-run", words[1]], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_what_cluster_commands_name_exists():
    checked = 0
    for block in of_kind("cluster"):
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0
        for words in commands_of(block):
            for word in words:
                if re.match(r"(tools|slurm|configs|megachiar)/", word) or word == "constraints.txt":
                    assert (ROOT / word).exists(), word
                    checked += 1
            tool = next((word for word in words if word.startswith("tools/")), None)
            if tool:
                help_text = python(tool, "--help").stdout
                assert all(word in help_text for word in words if word.startswith("--")), words
            if "--set" in words:
                config = re.sub(r"slurm/pretrain_(\w+)\.sh", r"configs/\1.yaml", words[1])
                load_config(ROOT / config, words[words.index("--set") + 1 :])
                checked += 1
    assert checked > 8


def test_python_commands_of_all_blocks_know_their_flags():
    for kind, block in blocks(README.read_text()):
        if kind == "run":
            for words in commands_of(re.sub(r"^(for .*|done)$", "", block, flags=re.MULTILINE)):
                program = ["-m", words[2]] if words[1] == "-m" else [words[1]]
                help_text = python(*program, "--help").stdout
                assert all(word in help_text for word in words if word.startswith("--")), words


@pytest.mark.slow
def test_run_blocks_run_word_for_word(tmp_path):
    folder = clone(tmp_path)
    path = f"{Path(sys.executable).parent}:{process_environment()['PATH']}"
    for block in of_kind("run"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env=process_environment(PATH=path, PYTHONPATH=str(folder)),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_for_real(tmp_path):
    """On a fresh clone with an empty home and package cache; it fails by itself if the bigram model is better."""
    folder = clone(tmp_path / "clone")
    home = tmp_path / "home"
    home.mkdir()
    env = process_environment(HOME=str(home), PIP_CACHE_DIR=str(home / "cache"))
    del env["OMP_NUM_THREADS"]
    (block,) = of_kind("quickstart")
    done = subprocess.run(["bash", "-c", block], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "interpolated bigram" in done.stderr and "sample" in done.stderr
