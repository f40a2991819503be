"""A command line that makes no sense is one message with what was meant, or what to give, for every command."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from support import ROOT, python

from megachiar.cli.main import COMMANDS, module_of
from megachiar.config import load_config
from megachiar.config.shipped import shipped_configs
from megachiar.errors import UserError
from megachiar.options import OptionError

NEEDS_NOTHING = {"quickstart", "bench-train", "bench-layers", "bench-dropout"}


def refused(line: str) -> OptionError:
    """Return the error of a command line, which is found before the command does anything."""
    command, *words = shlex.split(line)
    with pytest.raises(OptionError) as caught:
        importlib.import_module(module_of(command)).main(words)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_of_any_command_is_answered(command):
    for words in ("--no-such-thing-at-all", "--no-such-thing-at-all=3", "--no-such-thing-at-all 3"):
        if command == "config":
            words = f"show {words}"
        error = refused(f"{command} {words}")
        assert error.where == "--no-such-thing-at-all" and f"is no option of megachiar {command}" in error.problem
        assert f"`megachiar {command}" in error.remedy and "--help` lists all options" in error.remedy


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - NEEDS_NOTHING))
def test_a_missing_argument_of_any_command_is_asked_for_with_an_example(command):
    error = refused(command)
    assert error.where == f"megachiar {command}" and re.search(r" (is|are) missing$", error.problem)
    assert f"; for example `megachiar {command} " in error.remedy


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("pretrain --seq_length=5", "write --data.sequence_length=5"),
        ("pretrain --train-iters 5", "write --training.steps=5"),
        ("pretrain --config x --steps 5", "write --training.steps=5"),
        ("pretrain --config x --micro-batch-size 5", "write --training.micro_batch_size=5"),
        ("pretrain --config x --sequence-parallel", "write --parallel.sequence=VALUE"),
        ("pretrain --config x --bf16", "write --precision.compute=VALUE (bf16; else fp32)"),
        ("pretrain --config x --swiglu", "remove it: the feed-forward always has GELU"),
        ("pretrain --config x --dry_run", "write --dry-run"),
        ("pretrain --config x --dryrun", "did you mean --dry-run?"),
        ("inspect --config x --step 3 --train-iters=5", "write --training.steps=5"),
        ("plan --config x --gpus 8 --memory 80 --hidden-dropout 0", "write --model.dropout=VALUE"),
        ("evaluate RUN --seq-length 5", "use --sequence-length"),
        ("evaluate RUN --train-iters 5", "`megachiar evaluate --help`"),
        ("evaluate RUN --set a=1", "leave it out"),
        ("preprocess --vocab-file x", "use --tokenizer"),
        ("preprocess --append_eod", "write --append-eod"),
        ("generate RUN --max-tokens 5", "did you mean --max-new-tokens?"),
        ("config show --hole", "did you mean --whole?"),
        ("inspect PREFIX --set a=1", "megachiar inspect --config configs/tiny.yaml --step 100"),
        ("plan --gpus 8 --config x", "--memory-gib: memory of one GPU; for example `megachiar plan "),
        ("plan --gpus x --memory-gib 80 --config x", "--gpus: GPUs in all; for example `megachiar plan --gpus 64"),
        ("config show", "NAME: such as tiny; see `megachiar config list`"),
        ("calibrate RUN --where x", "--where: what to measure; for example `megachiar calibrate "),
    ],
)
def test_what_was_meant_is_said(line, remedy):
    assert remedy in refused(line).remedy


def test_the_stacks_of_a_word_are_named():
    assert "Megatron-LM" in refused("pretrain --train-iters 5").problem


def test_what_is_no_unknown_option_is_left_alone():
    """A value that looks like an option, the beginning of an option, and what stands after a double dash."""
    from megachiar import pretrain
    from megachiar.cli import generate

    assert pretrain.parse_arguments(["--config", "x", "--dry"]).dry_run
    options = generate.parse_arguments(["RUN", "--prompt=--seq-length 5", "--top-k", "3"])
    assert (options.prompt, options.top_k) == ("--seq-length 5", 3)
    assert generate.parse_arguments(["RUN", "--prompt", "-- he said"]).prompt == "-- he said"
    assert str(generate.parse_arguments(["--", "--run"]).run) == "--run"


@pytest.mark.parametrize("name", ["tiny", "tiny.yaml", "nowhere/tiny.yml", "tinny"])
def test_the_name_of_a_shipped_config_is_told_how_to_become_a_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such config file") as caught:
        load_config(Path(name))
    assert "`megachiar config init tiny` writes the shipped config to tiny.yaml" in caught.value.remedy
    assert "tiny" in shipped_configs()
    with pytest.raises(UserError) as caught:
        load_config(Path("nowhere.yaml"))
    assert "config init" not in caught.value.remedy


def test_a_wrong_option_is_one_message_of_the_program():
    done = python("-m", "megachiar", "pretrain", "--train-iters", "5")
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 2
    assert "error: --train-iters: is no option of megachiar pretrain" in done.stderr and str(ROOT) not in done.stderr
