"""The oldest transformers that the extra allows serves like the newest: the tests of both exports run again with it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
from support import ROOT

from megachiar.interop.huggingface_library import OLDEST

TESTS = ("test_huggingface_models.py", "test_huggingface_runs.py", "test_huggingface_finished.py")
LIBRARY = "import transformers; print(transformers.__version__)"

pytestmark = pytest.mark.slow


def test_the_exports_work_with_it(tmp_path):
    oldest, packages = ".".join(map(str, OLDEST)) + ".0", tmp_path / "packages"
    # Its Trainer imports datasets where that is installed, and the one that is here needs a newer hub than it has.
    others = ["datasets", *(f"{name}=={importlib.metadata.version(name)}" for name in ("numpy", "safetensors"))]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--target",
        packages,
        f"transformers=={oldest}",
        *others,
    ]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"transformers {oldest} cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    env = {**os.environ, "PYTHONPATH": str(packages)}
    assert subprocess.check_output([sys.executable, "-c", LIBRARY], env=env, text=True).strip() == oldest
    run = [sys.executable, "-m", "pytest", "-q", "-rs", *(ROOT / "tests" / "interop" / name for name in TESTS)]
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed, skipped = (re.search(rf"(\d+) {word}", done.stdout) for word in ("passed", "skipped"))
    assert passed is not None and int(passed[1]) > 200 and skipped is None, done.stdout[-2000:]
