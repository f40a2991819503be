"""A command line that makes no sense is one message with what was meant, or what to give, for every command."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, python

from megachiar import console
from megachiar.cli.main import COMMANDS, main, module_of
from megachiar.config import load_config
from megachiar.config.shipped import shipped_configs
from megachiar.errors import UserError
from megachiar.options import OptionError, Parser

NEEDS_NOTHING = {"quickstart", "bench-train", "bench-layers", "bench-dropout", "bench-decode", "bench-device"}


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
        if command in ("config", "checkpoint"):
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


@pytest.mark.parametrize("name", ["mine.yml", "mine", "Mine.yaml", "mein.yaml", "mine.yaml.yaml"])
def test_the_nearest_config_beside_a_missing_one_is_named(tmp_path, name):
    for other in ("mine.yaml", "text.txt", "minx", "entirely-else.yaml"):
        (tmp_path / other).touch()
    with pytest.raises(UserError, match="no such config file") as caught:
        load_config(tmp_path / name)
    assert caught.value.remedy.startswith(f"did you mean {tmp_path / 'mine.yaml'}? else check the path")


@pytest.mark.parametrize("name", ["other.yaml", "nowhere/mine.yaml", "mine.yaml/mine.yaml", "a" * 300])
def test_a_missing_config_with_none_near_it_names_none(tmp_path, name):
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / name)
    assert "did you mean" not in caught.value.remedy


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_commands_that_read_a_config_name_the_nearest(tmp_path, command):
    (tmp_path / "mine.yaml").touch()
    more = {"inspect": ["--step", "1"], "plan": ["--gpus", "8", "--memory-gib", "80"]}[command]
    with pytest.raises(UserError) as caught:
        main([command, "--config", str(tmp_path / "mine.yml"), *more])
    assert "did you mean" in str(caught.value), caught.value


def test_a_wrong_option_is_one_message_of_the_program():
    done = python("-m", "megachiar", "pretrain", "--train-iters", "5")
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 2
    assert "error: --train-iters: is no option of megachiar pretrain" in done.stderr and str(ROOT) not in done.stderr


def numeric_options() -> Iterator[tuple[str, str]]:
    """Yield each option of a command that takes a number, after the command."""
    for command in COMMANDS:
        for action in actions_of(command):
            name = getattr(action.type, "__name__", "")
            if action.option_strings and name in ("int", "float"):
                yield command, action.option_strings[-1]


def actions_of(command: str) -> list[argparse.Action]:
    """Return the arguments of a command, from the parser that it makes."""

    class Stop(Exception):
        pass

    seen: list[argparse.Action] = []

    def stop(self, args=None, namespace=None):
        seen.extend(self._actions)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", stop)
        with contextlib.suppress(Stop):
            importlib.import_module(module_of(command)).main([])
    return seen


@pytest.mark.parametrize(("command", "option"), numeric_options())
def test_no_number_of_any_command_may_be_nan_or_infinite(command, option):
    for value in ("nan", "inf", "-inf", "1e999"):
        error = refused(f"{command} {option}={value}")
        assert error.where == f"megachiar {command} {option}"
        assert error.problem in (f"{value} is no finite number", f"invalid int value: {value!r}")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_any_command_has_help(command):
    assert [a.dest for a in actions_of(command) if a.help is None and a.nargs != argparse.PARSER] == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("pretrain --config x --dry-run --world-size 0", "0 is not at least 1"),
        ("pretrain --config x --dry-run --world-size -2", "-2 is not at least 1"),
        ("generate RUN --top-k 0", "0 is not at least 1"),
        ("generate RUN --top-p 0", "0 is not above 0 and at most 1"),
        ("generate RUN --top-p 1.5", "1.5 is not above 0 and at most 1"),
        ("generate RUN --temperature -1", "-1 is not at least 0"),
        ("generate RUN --seed 99999999999999999999", f"99999999999999999999 is not at least 0 and at most {2**62}"),
        ("generate RUN --num-samples 0", "0 is not at least 1"),
        ("calibrate RUN --where layers --attention-share 2", "2 is not at least 0 and at most 1"),
        ("calibrate RUN --tokens 0", "0 is not at least 1"),
        ("flips RUN --sequences 0", "0 is not at least 1"),
        ("analyze-routing RUN --sequences 3", f"3 is not at least 4 and at most {2**62}"),
        ("analyze-routing RUN --switches -1", f"-1 is not at least 0 and at most {2**62}"),
        ("analyze-routing RUN --batch-size 0", "0 is not at least 1"),
        ("evaluate RUN --batch-size 0", "0 is not at least 1"),
        ("evaluate RUN --sequence-length 0", "0 is not at least 1"),
        ("plan --config x --gpus 8 --memory-gib 80 --reserve 1", "1 is not at least 0 and below 1"),
        ("bench-layers --hidden-size 0", "0 is not at least 2"),
        ("bench-layers --sequence-length 256 0", "0 is not at least 1"),
        ("bench-train --layers 0", "0 is not at least 2"),
        ("bench-dropout --threads 0", "0 is not at least 1"),
        ("bench-data preprocess --workers 0", "0 is not at least 1"),
        ("preprocess --workers 0", "0 is not at least 1"),
    ],
)
def test_a_number_outside_its_limits_is_refused_with_them(line, problem):
    error = refused(line)
    assert error.problem == problem and not error.remedy.startswith("change")


@pytest.mark.parametrize(
    ("line", "problem", "remedy"),
    [
        ("bench-layers --hidden-size 255 --heads 4", "4 does not divide 255", "give --hidden-size 248 or 256"),
        ("bench-layers --hidden-size 6 --heads 2", "a head has 3 channels", "give --hidden-size 4 or 8"),
        ("preprocess --json-keys text", "is no option", "use --text-key"),
        ("preprocess --partitions=4", "is no option", "use --shard K/N and --merge-shards N"),
        ("merge --input a b", "is no option", "megachiar merge data/part0 data/part1 --output data/whole"),
        ("merge a b --output-prefix c", "is no option", "use --output"),
        ("pretrain --config x --eod-mask-loss", "one of Megatron-LM", "remove it: there is no such key"),
    ],
)
def test_a_wrong_size_or_word_gets_what_works(line, problem, remedy):
    error = refused(line)
    assert problem in error.problem and remedy in error.remedy


def test_sizes_that_make_no_model_name_the_option_and_no_file():
    for line, option in (("--layers 4 --heads 3", "--heads"), ("--variant v model.num_layers=1", "--set model")):
        with pytest.raises(UserError) as caught:
            importlib.import_module(module_of("bench-train")).main(shlex.split(line))
        assert str(caught.value).startswith("megachiar bench-train: 1 problem\n" + option)
        assert ".yaml" not in str(caught.value)


@pytest.mark.parametrize("rank", ["x", "", "-1", "1.5"])
def test_a_rank_that_is_no_number_does_not_hide_what_is_wrong(monkeypatch, capsys, rank):
    monkeypatch.setenv("RANK", rank)

    def fail() -> int:
        raise UserError("here", "is wrong", "mend it")

    with pytest.raises(SystemExit) as caught:
        console.run(fail)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("error: here: is wrong")
