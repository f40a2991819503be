"""The options that commands share: values of all uses are kept, and ``--a.b=c`` is ``--set a.b=c``."""

from __future__ import annotations

import json
import re

import pytest
from support import forked_python, small_config, write_config, write_tokens

from megachiar.cli.main import COMMANDS
from megachiar.errors import UserError
from megachiar.options import CommandParser, add_config_options, add_run_argument

MEGACHIAR = ("-m", "megachiar")
PRETRAIN = ("megachiar/pretrain.py", "--local_rank=0", "--config", "configs/tiny.yaml", "--dry-run")
PLAN = (*MEGACHIAR, "plan", "--gpus", "2", "--memory-gib", "80", "--config", "configs/tiny.yaml")
READ_A_CONFIG = {"pretrain", "inspect", "plan", "replay", "bench-checkpoint", "import"}


def config_parser() -> CommandParser:
    parser = CommandParser("command", "A command.")
    add_config_options(parser)
    return parser


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "a.b=1", "c.d=2", "a.b=3"],
        ["--set", "a.b=1", "--set", "c.d=2", "--set", "a.b=3"],
        ["--a.b=1", "--set", "c.d=2", "--a.b=3"],
        ["--set=a.b=1", "--c.d=2", "--set", "a.b=3"],
    ],
)
def test_overrides_are_kept_in_the_order_they_are_given_in(arguments):
    parser = config_parser()
    for _ in range(2):  # the default is not what the first use was added to
        assert parser.parse_args(["--config", "x", *arguments]).overrides == ["a.b=1", "c.d=2", "a.b=3"]
    assert parser.parse_args(["--config", "x"]).overrides == []


def test_a_short_override_takes_no_word_after_it():
    parser = config_parser()
    add_run_argument(parser)
    words = ["--config", "x", "--data.train.0.path=a b=c\nd", "--data.validation.my-set=e", "runs/tiny"]
    options = parser.parse_args(words)
    assert options.overrides == ["data.train.0.path=a b=c\nd", "data.validation.my-set=e"]
    assert str(options.run) == "runs/tiny"


def test_an_option_of_several_values_keeps_those_of_every_use():
    parser = CommandParser("command", "A command.")
    parser.add_argument("--input", nargs="+", required=True)
    parser.add_argument("--share", nargs="+", type=float, default=[0.5])
    parser.add_argument("--seed", type=int)
    options = parser.parse_args(["--input", "a", "b", "--share", "1", "--input", "c", "--share", "0.5", "--seed", "1"])
    assert (options.input, options.share, options.seed) == (["a", "b", "c"], [1.0, 0.5], 1)
    assert parser.parse_args(["--input", "a", "--seed", "1", "--seed", "2"]).seed == 2
    assert parser.parse_args(["--input", "a"]).share == [0.5]


def test_an_override_without_a_value_is_refused():
    with pytest.raises(UserError, match=r"--a\.b: has no value\n .*--a\.b=VALUE, or --set a\.b=VALUE"):
        config_parser().parse_args(["--config", "x", "--a.b", "3"])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_overrides_or_says_that_it_reads_no_config(command):
    takes = re.search("^  --set ", forked_python(*MEGACHIAR, command, "--help").stdout, re.M) is not None
    assert takes == (command in READ_A_CONFIG)
    if not takes:
        done = forked_python(*MEGACHIAR, command, "--model.num_layers=3")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert (
            "--model.num_layers=3: sets a key of a config" in done.stderr
            and f"megachiar {command} has no --set" in done.stderr
        )


def test_pretrain_takes_every_override():
    sets = ("--set", "training.steps=7", "--set", "training.seed=5", "training.global_batch_size=64")
    done = forked_python(*PRETRAIN, *sets, "--training.steps=9")
    assert done.returncode == 0, done.stderr
    for line in ("  steps: 9\n", "  seed: 5\n", "  global_batch_size: 64\n"):
        assert line in done.stdout


def test_the_planner_takes_every_override():
    sets = ("--set", "logging.folder=here", "--set", "precision.compute=bf16", "--training.global_batch_size=64")
    done = forked_python(*PLAN, *sets)
    assert done.returncode == 0, done.stderr
    assert "here: bf16, batch 64" in done.stdout


def test_inspection_takes_every_override(tmp_path):
    write_tokens(tmp_path / "train")
    write_tokens(tmp_path / "valid", seed=1)
    config = write_config(tmp_path / "config.yaml", small_config(tmp_path))
    sets = ("--set", "training.seed=8", "--set", "training.global_batch_size=2", "--training.micro_batch_size=1")
    command = (*MEGACHIAR, "inspect", "--config", config, "--step", "1", "--json")
    done, plain = forked_python(*command, *sets), forked_python(*command)
    assert done.returncode == 0, done.stderr
    samples = json.loads(done.stdout)["samples"]
    assert len(samples) == 2 and len(json.loads(plain.stdout)["samples"]) == 8
    assert samples != json.loads(forked_python(*command, *sets[2:]).stdout)["samples"], "the seed was set, too"


@pytest.mark.parametrize("program", [PRETRAIN, PLAN])
def test_an_unknown_key_is_refused_with_the_nearest(program):
    done = forked_python(*program, "--trainin.steps=3")
    assert done.returncode == 2 and "did you mean `training`?" in done.stderr and "Traceback" not in done.stderr
