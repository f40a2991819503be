"""`.ci/pythons` finds the promised Pythons that start, and says which it leaves out."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from support import ROOT, run_command

OTHER = "3.10" if sys.version_info[:2] != (3, 10) else "3.13"
THIS = "{}.{}".format(*sys.version_info)


@pytest.fixture
def path(tmp_path) -> str:
    """A search path with this Python on it, and one that pretends to be another but does not start, as a shim may."""
    for tool in ("bash", "dirname", "mktemp", "rm"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    this, other = tmp_path / f"python{THIS}", tmp_path / f"python{OTHER}"
    this.write_text(f'#!{shutil.which("bash")}\nexec "{sys.executable}" "$@"\n')
    other.write_text(f'#!{shutil.which("bash")}\necho "command not found" >&2\nexit 127\n')
    this.chmod(0o755)
    other.chmod(0o755)
    return str(tmp_path)


def listed(**env: str) -> dict[str, str]:
    """What `.ci/pythons --list` says of each version."""
    done = run_command(ROOT / ".ci" / "pythons", "--list", **env)
    assert done.returncode == 0, done.stderr
    return {line.split()[1]: line for line in done.stdout.splitlines()}


def test_only_a_python_that_starts_is_here(path):
    lines = listed(PATH=path)
    assert list(lines) == ["3.10", "3.11", "3.12", "3.13"]
    assert lines[THIS].endswith(os.path.join(path, f"python{THIS}"))
    assert f"left out: no python{OTHER} that starts" in lines[OTHER]


def test_a_later_one_on_the_path_is_taken_where_the_first_does_not_start(path, tmp_path):
    later = tmp_path / "later"
    later.mkdir()
    Path(path, f"python{THIS}").rename(later / f"python{THIS}")
    Path(path, f"python{OTHER}").rename(Path(path, f"python{THIS}"))
    assert listed(PATH=f"{path}:{later}")[THIS].endswith(str(later / f"python{THIS}"))


def test_one_of_another_version_is_not_taken(path):
    Path(path, f"python{OTHER}").write_bytes(Path(path, f"python{THIS}").read_bytes())
    assert "left out" in listed(PATH=path)[OTHER]


def test_one_can_be_skipped(path):
    assert listed(PATH=path, SKIP=THIS)[THIS].endswith("left out as asked")


def test_several_can_be_skipped(path):
    lines = listed(PATH=path, SKIP=f"{OTHER} {THIS}")
    assert [version for version, line in lines.items() if line.endswith("left out as asked")] == sorted([THIS, OTHER])
