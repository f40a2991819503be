"""Reading a run needs no engine: every command that reads one works where DeepSpeed cannot be imported."""

from __future__ import annotations

import json
import shutil
import sys

from support import ROOT, run_command

WRITTEN = ROOT / "tests" / "fixtures" / "written_by_0.1.0"
COMMANDS = {
    "megachiar.cli.evaluate": ["run", "--data", "train"],
    "megachiar.cli.generate": ["run", "--prompt", "a", "--max-new-tokens", "2"],
    "megachiar.cli.calibrate": ["run", "--data", "train", "--tokens", "64"],
    "megachiar.cli.flips": ["run", "--data", "train", "--sequences", "1"],
    "megachiar.cli.analyze_routing": ["run", "--data", "train", "--sequences", "4", "--switches", "2"],
    "megachiar.cli.inspect": ["--config", "run.yaml", "--step", "2"],
    "megachiar.pretrain": ["--config", "run.yaml", "--dry-run"],
}
WITHOUT_DEEPSPEED = """
import json, os, sys
from importlib import import_module
sys.modules["deepspeed"] = None  # from here on its import fails
os.chdir(sys.argv[1])
for module, arguments in json.loads(sys.argv[2]).items():
    assert import_module(module).main(arguments) in (None, 0), module
"""


def test_a_run_is_read_without_deepspeed(tmp_path):
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    done = run_command(sys.executable, "-c", WITHOUT_DEEPSPEED, tmp_path, json.dumps(COMMANDS))
    assert done.returncode == 0, done.stderr
