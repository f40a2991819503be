"""The working tree as a stranger would get it, and commands that run in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, process_environment

from megachiar.data.preprocessing import corpus
from megachiar.data.preprocessing.existing import note_path, write_note


def clone(folder: Path) -> Path:
    """Copy what would be committed now to ``folder``: nothing that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the project is not known")
    for name in listed.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def environment_of(folder: Path) -> dict[str, str]:
    """What commands of a clone run in: this Python, and the clone's package."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = process_environment(PATH=path, PYTHONPATH=str(folder))
    del env["OMP_NUM_THREADS"]
    return env


def run_shell(commands: str, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run commands of a shell that stops at the first one that fails."""
    command = ["bash", "-euo", "pipefail", "-c", commands]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def put_small_corpus(folder: Path) -> None:
    """Put a small corpus where the quickstart's is, as if it had been fetched, and let it train for 4 steps."""
    data = folder / "data" / "shakespeare"
    counts = corpus.write_corpus(corpus.python_help_texts(), data)
    write_note(note_path(data / "corpus"), {"source": "shakespeare"}, list(corpus.part_paths(data).values()), counts)
    config = folder / "configs" / "tiny.yaml"
    assert "  steps: 1200\n" in config.read_text()
    config.write_text(config.read_text().replace("  steps: 1200\n", "  steps: 4\n"))
