"""The console command: what it lists is there, it imports only what is asked for, and tools/ are the same functions."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import yaml
from support import ROOT, forked_python, process_environment, python

import megachiar
from megachiar.checkout import checkout_commit
from megachiar.cli import config, quickstart
from megachiar.cli.main import COMMANDS, ELSEWHERE, main, module_of, nearest_command, start
from megachiar.config import load_config
from megachiar.config.shipped import shipped_configs, shipped_sweeps
from megachiar.errors import UserError
from megachiar.model.dtypes import DTYPES
from megachiar.options import PRECISIONS

TOOLS = {path: re.search(r"megachiar\.cli\.(\w+) ", path.read_text())[1] for path in (ROOT / "tools").glob("*.py")}
WITHOUT_TOOL = {"pretrain"}  # megachiar/pretrain.py is its file


IMPORTED = """
import contextlib, json, os, sys
before = set(sys.modules)
from megachiar.cli.main import main
imported = {}
for words in json.loads(sys.argv[1]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(open(os.devnull, "w")):
        main(words)
    tops = {name.partition(".")[0] for name in set(sys.modules) - before}
    imported[" ".join(words)] = sorted(tops - set(sys.stdlib_module_names))
print(json.dumps(imported))
"""


def test_help_and_version_import_nothing_but_the_standard_library():
    """Of the whole program and of every command, so that they are printed at once."""
    words = [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    words += [["config", action, "--help"] for action in ("list", "show", "init", "schema")]
    done = python("-c", IMPORTED, json.dumps(words))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {" ".join(each): ["megachiar"] for each in words}


def test_the_number_formats_of_options_are_those_of_the_model():
    assert set(PRECISIONS) == set(DTYPES)


def test_help_names_every_command_once(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) is None
        shown = capsys.readouterr().out
        assert re.findall(r"^  ([\w-]+)  +\w", shown, re.M) == list(COMMANDS)
        assert max(map(len, shown.splitlines())) <= 80


def test_every_command_is_a_module_and_every_module_a_command():
    modules = {path.stem for path in (ROOT / "megachiar" / "cli").glob("*.py")} - {"__init__", "main"}
    assert modules == {module_of(command).rpartition(".")[2] for command in set(COMMANDS) - set(ELSEWHERE)}
    for command in COMMANDS:
        assert callable(importlib.import_module(module_of(command)).main)


def test_every_command_but_training_has_its_tool():
    modules = [module_of(command).rpartition(".")[2] for command in set(COMMANDS) - WITHOUT_TOOL]
    assert sorted(TOOLS.values()) == sorted(modules)


@pytest.mark.parametrize("tool", sorted(set(TOOLS) - {ROOT / "tools" / "config_schema.py"}), ids=lambda path: path.stem)
def test_a_tool_is_the_command(tool):
    command = TOOLS[tool].rstrip("_").replace("_", "-")
    by_file, by_name = forked_python(tool, "--help"), forked_python("-m", "megachiar", command, "--help")
    assert by_file.returncode == by_name.returncode == 0
    assert by_file.stdout == by_name.stdout and by_name.stdout.startswith(f"usage: megachiar {command} ")


def test_the_way_in_of_launchers_is_the_command():
    shown = [
        forked_python(*way, "--help").stdout
        for way in (["megachiar/pretrain.py"], ["-m", "megachiar.pretrain"], ["-m", "megachiar", "pretrain"])
    ]
    assert shown[0] == shown[1] == shown[2] and shown[0].startswith("usage: megachiar pretrain ")


def test_the_schema_tool_prints_the_schema():
    assert python("tools/config_schema.py").stdout == (ROOT / "configs" / "schema.json").read_text()


def test_the_installed_script_starts_it():
    (script,) = entry_points(group="console_scripts", name="megachiar")
    assert script.load() is start


@pytest.mark.parametrize(
    ("word", "meant"),
    [("genrate", "generate"), ("bench_train", "bench-train"), ("--plan", "plan"), ("x", None)],
)
def test_an_unknown_command_is_one_message_with_the_nearest(word, meant):
    done = python("-m", "megachiar", word, "--set", "a.b=1")
    assert done.returncode == 2 and done.stdout == ""
    assert f"error: megachiar {word}: there is no such command" in done.stderr and len(done.stderr.splitlines()) == 2
    assert ("did you mean" in done.stderr) == (meant is not None)
    assert nearest_command(word).startswith(f"did you mean `megachiar {meant}`?" if meant else "`megachiar --help`")


def test_a_launchers_argument_may_come_before_the_command():
    done = forked_python("-m", "megachiar", "--local_rank=0", "config", "list")
    assert done.returncode == 0 and "tiny" in done.stdout


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(
        ["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_version_tells_a_checkouts_commit(tmp_path, capsys):
    assert checkout_commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "--short", "HEAD")
    assert checkout_commit(tmp_path) == commit
    (tmp_path / "file").write_text("b")
    assert checkout_commit(tmp_path) == f"{commit}-dirty"
    main(["--version"])
    assert capsys.readouterr().out.startswith(f"megachiar {megachiar.__version__}")


def test_a_damaged_checkout_has_no_commit(tmp_path):
    (tmp_path / ".git").write_text("gitdir: /nowhere")
    assert checkout_commit(tmp_path) is None


def test_every_shipped_config_is_listed_and_shown(capsys):
    config.main(["list"])
    listed = capsys.readouterr().out
    names = [*shipped_configs(), *shipped_sweeps()]
    assert re.findall(r"^([\w/-]+) +\w.{10,}$", listed, re.M) == names and len(names) > 12
    config.main(["show", "tiny"])
    assert capsys.readouterr().out == (ROOT / "configs" / "tiny.yaml").read_text()


def test_a_shipped_config_is_copied_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config.main(["init", "tiny"])
    assert "tiny.yaml" in capsys.readouterr().out
    assert load_config("tiny.yaml") == load_config(ROOT / "configs" / "tiny.yaml")
    os.utime("tiny.yaml", (0, 0))
    config.main(["init", "tiny"])  # the same file is no error, and stays
    assert "exists already" in capsys.readouterr().out and Path("tiny.yaml").stat().st_mtime == 0
    Path("tiny.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"tiny\.yaml: exists already and is another config\n .*--overwrite"):
        config.main(["init", "tiny.yaml"])
    assert Path("tiny.yaml").read_text() == "mine"
    config.main(["init", "tiny", "--overwrite"])
    assert Path("tiny.yaml").read_text() != "mine"
    with pytest.raises(UserError, match=r"tinny: there is no such shipped config\n .*did you mean tiny\? "):
        config.main(["init", "tinny"])


def test_the_quickstart_takes_the_config_at_hand_or_brings_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quickstart.find_config() == Path("tiny.yaml") and Path("tiny.yaml").exists()
    Path("tiny.yaml").write_text("mine")
    assert quickstart.find_config() == Path("tiny.yaml") and Path("tiny.yaml").read_text() == "mine"
    monkeypatch.chdir(ROOT)
    assert quickstart.find_config() == Path("configs/tiny.yaml")


def test_relative_paths_of_a_config_are_of_the_current_folder(tmp_path):
    """A copied config finds what lies where its user is, and says where it looked."""
    command = [sys.executable, "-m", "megachiar"]
    env = process_environment(PYTHONPATH=str(ROOT))
    subprocess.run([*command, "config", "init", "tiny"], cwd=tmp_path, env=env, check=True, capture_output=True)
    inspect = [*command, "inspect", "--config", "tiny.yaml", "--step", "1", "--json"]
    done = subprocess.run(inspect, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "data/shakespeare/train" in done.stderr and str(ROOT) not in done.stderr
    (tmp_path / "corpus.txt").write_text("All the world's a stage, and all the men and women merely players.\n" * 200)
    for arguments in (
        ["tokenizer", "--input", "corpus.txt", "--vocab-size", "270", "--output", "t.json"],
        ["preprocess", "--input", "corpus.txt", "--tokenizer", "t.json", "--output-prefix", "data/shakespeare/train"],
    ):
        subprocess.run([*command, *arguments], cwd=tmp_path, env=env, check=True, capture_output=True)
    inspect += ["--model.vocab_size=270", "--data.validation.valid=data/shakespeare/train"]
    again = subprocess.run(inspect, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert len(json.loads(again.stdout)["samples"]) == load_config(tmp_path / "tiny.yaml").training.global_batch_size


def test_a_shipped_config_comes_with_its_base(tmp_path, monkeypatch, capsys):
    """A base that is there already is the user's own, and is kept."""
    monkeypatch.chdir(tmp_path)
    config.main(["init", "400m_baseline"])
    assert "400m.yaml: copied as its base" in capsys.readouterr().out
    assert load_config("400m_baseline.yaml") == load_config(ROOT / "configs" / "400m_baseline.yaml")
    Path("400m_baseline.yaml").unlink()
    own = Path("400m.yaml").read_text().replace("num_layers: 28", "num_layers: 12")
    Path("400m.yaml").write_text(own)
    config.main(["init", "400m_baseline"])
    assert "400m.yaml: kept, since it was there already" in capsys.readouterr().out
    assert Path("400m.yaml").read_text() == own and load_config("400m_baseline.yaml").model.num_layers == 12
    config.main(["init", "400m_baseline", "--overwrite"])
    assert load_config("400m_baseline.yaml").model.num_layers == 28


def test_a_config_of_a_folder_is_copied_to_that_folder(tmp_path, monkeypatch, capsys):
    """Its base is the published one, though a recommended one of the same name is there."""
    monkeypatch.chdir(tmp_path)
    config.main(["init", "400m"])
    config.main(["init", "published/400m_baseline"])
    assert "published/400m.yaml: copied as its base" in capsys.readouterr().out
    shipped = ROOT / "configs" / "published" / "400m_baseline.yaml"
    assert load_config("published/400m_baseline.yaml") == load_config(shipped)
    Path("mine.yaml").write_text("base: published/wikitext-2\n")
    assert load_config("mine.yaml") == load_config(ROOT / "configs" / "published" / "wikitext-2.yaml")
    config.main(["init", "sweeps/ablation"])
    assert "see what it needs with `megachiar sweep sweeps/ablation.yaml --dry-run`" in capsys.readouterr().out
    assert Path("sweeps/ablation.yaml").read_bytes() == (ROOT / "configs" / "sweeps" / "ablation.yaml").read_bytes()
    with pytest.raises(UserError, match="is a sweep, not the config of one run"):
        config.main(["show", "sweeps/ablation", "--whole"])


def test_a_shipped_config_is_shown_as_its_file_or_whole(tmp_path, capsys):
    shipped = ROOT / "configs" / "400m_baseline.yaml"
    config.main(["show", "400m_baseline"])
    assert capsys.readouterr().out == shipped.read_text()
    config.main(["show", "400m_baseline", "--whole"])
    (tmp_path / "whole.yaml").write_text(capsys.readouterr().out)
    assert "base" not in yaml.safe_load((tmp_path / "whole.yaml").read_text())
    assert load_config(tmp_path / "whole.yaml") == load_config(shipped)
