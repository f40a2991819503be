"""All commands read their command line by one parser, which has the options that several of them share.

``--set a.b=c d.e=f`` overrides keys of a config, and ``--a.b=c`` is short for ``--set a.b=c``. A later one wins.
What is wrong with a command line is one message with its remedy, as everything else that a user can mend.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megachiar.errors import UserError

OPTION = re.compile(r"--[A-Za-z_][\w-]*")
CONFIG_KEY = re.compile(r"--[A-Za-z_]\w*(\.[\w-]+)+(?P<equals>=.*)?", re.DOTALL)


PRECISIONS = ("fp32", "bf16", "fp16")
"""The names of number formats as options take them, those of ``precision.compute``, fp32 first."""


Number = TypeVar("Number", int, float)


def number(
    kind: type[Number],
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> Callable[[str], Number]:
    """Return a function by which a parser reads a finite number within limits.

    Args:
        kind: whether it is a whole number.
        least, most: the limits where they are allowed themselves.
        above, below: the limits where they are not.
    """
    limits = (("at least", least), ("above", above), ("at most", most), ("below", below))
    wanted = " and ".join(f"{word} {limit}" for word, limit in limits if math.isfinite(limit))

    def parsed(text: str) -> Number:
        value = kind(text)
        if isinstance(value, float) and not math.isfinite(value):  # any whole number is finite, and may be huge
            raise argparse.ArgumentTypeError(f"{text} is no finite number")
        if not (least <= value <= most and above < value < below):
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    parsed.__name__ = kind.__name__  # argparse says so where the text is no number
    return parsed


class OptionError(UserError):
    """An option of a command makes no sense; every rank of a run has the same command line."""

    same_on_every_rank = True


class Parser(argparse.ArgumentParser):
    """A parser of options.

    It differs from argparse's in four ways. An option of several values keeps the values of all its uses, ``--a.b=c``
    overrides a key of the config, a float is finite, and what is wrong is an ``OptionError``.
    """

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        for action in (None, "store"):
            self.register("action", action, _Store)
        self.register("type", float, number(float))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read ``args``, or the command line of the process, as ``argparse`` does.

        Raises:
            OptionError: an option is unknown, misses its value or has a wrong one, or a required one is not given.
        """
        arguments = self._with_sets(sys.argv[1:] if args is None else args)
        if self._subparsers is None:  # else the options are those of the parser below
            self._check_options(arguments)
        return super().parse_known_args(arguments, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise what ``argparse`` has found to be wrong, with a remedy."""
        required = re.fullmatch(r"the following arguments are required: (.+)", message, re.DOTALL)
        if required is not None:
            names = required[1].split(", ")
            wanted = "; ".join(self._with_help(name) for name in names)
            what = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
            raise OptionError(self.prog, what, f"give {wanted}{self.example(*names)}")
        wrong = re.fullmatch(r"argument ([^:]+): (.+)", message, re.DOTALL)
        if wrong is not None:
            name = wrong[1].split("/")[-1]
            remedy = f"{self._with_help(name)}{self.example(name)}. `{self.prog} --help` tells more"
            raise OptionError(f"{self.prog} {name}", wrong[2], remedy)
        raise OptionError(self.prog, message, f"`{self.prog} --help` lists what it takes{self.example()}")

    def example(self, *names: str) -> str:
        """Return an example from the description, one with an argument of ``names`` if there is one, as a clause."""
        text = (self.description or "").replace("\\\n", " ")
        lines = [line.partition("  #")[0] for line in text.splitlines() if line.strip().startswith(f"{self.prog} ")]
        examples = [" ".join(line.split()) for line in lines]
        best = next((example for example in examples if any(f" {name}" in example for name in names)), None)
        return f"; for example `{best or examples[0]}`" if examples else ""

    def _with_help(self, name: str) -> str:
        """Return the name of an argument with what its help says."""
        for action in self._actions:
            if name in action.option_strings or name in (action.metavar, action.dest):
                text = self._get_formatter()._expand_help(action) if action.help else ""
                return f"{name}: {text}" if text else name
        return name

    def _check_options(self, arguments: Sequence[str]) -> None:
        """Check that every option is one of this command, or the beginning of one.

        Raises:
            OptionError: an option is none. The message has the one that was probably meant.
        """
        for place, argument in enumerate(arguments):
            if argument == "--":
                return
            name, equals, value = argument.partition("=")
            if OPTION.fullmatch(name) is None or any(known.startswith(name) for known in self._option_string_actions):
                continue
            if not equals and place + 1 < len(arguments) and not arguments[place + 1].startswith("-"):
                value = arguments[place + 1]
            raise self._unknown(name, value)

    def _unknown(self, name: str, value: str) -> OptionError:
        """Return the answer to an option that this command does not have."""
        known = [option for option in self._option_string_actions if OPTION.fullmatch(option)]
        if name == "--set":
            return self._no_config(f"--set {value}".rstrip())
        if (ours := name.replace("_", "-").lower()) in known:
            return OptionError(name, f"is no option of {self.prog}", f"write {ours}")

        from megachiar.config.option_words import OPTIONS, meant_key, normalized

        if (remedy := OPTIONS.get(self.prog.rpartition(" ")[2], {}).get(normalized(name))) is not None:
            return OptionError(name, f"is no option of {self.prog}", remedy)
        whose, remedy = "", ""
        if (meant := meant_key(name)) is not None:
            whose = f", but one of {meant.stacks}" if meant.stacks else ""
            options = {f"--{key.rpartition('.')[2].replace('_', '-')}" for key in meant.keys}.intersection(known)
            if options:
                remedy = f"use {' or '.join(sorted(options))}"
            elif "--set" in known:
                remedy = _in_a_config(meant.keys, meant.how, value)
        if remedy:
            return OptionError(name, f"is no option of {self.prog}{whose}", remedy)
        near = difflib.get_close_matches(name[2:], [option[2:] for option in known], n=1, cutoff=0.7)
        question = f"did you mean --{near[0]}? " if near else ""
        return OptionError(name, f"is no option of {self.prog}", f"{question}`{self.prog} --help` lists all options")

    def _no_config(self, argument: str) -> OptionError:
        problem = f"sets a key of a config, and {self.prog} has no --set"
        return OptionError(argument, problem, f"leave it out; `{self.prog} --help` lists all options")

    def _with_sets(self, arguments: Sequence[str]) -> list[str]:
        """Return ``arguments`` with each ``--a.b=c`` as ``--set=a.b=c``, so that it takes no word after it."""
        before, after = list(arguments), []
        if "--" in before:
            before, after = before[: before.index("--")], before[before.index("--") :]
        return [self._with_set(argument) for argument in before] + after

    def _with_set(self, argument: str) -> str:
        key = CONFIG_KEY.fullmatch(argument)
        if key is None:
            return argument
        if "--set" not in self._option_string_actions:
            raise self._no_config(argument)
        if key["equals"] is None:
            raise OptionError(argument, "has no value", f"write {argument}=VALUE, or --set {argument[2:]}=VALUE")
        return f"--set={argument[2:]}"


class CommandParser(Parser):
    """The parser of ``megachiar COMMAND``, the same for every way to start the command.

    Args:
        command: the name of the command.
        description: what ``--help`` prints, the docstring of the command's module. Errors take their examples from it.
    """

    def __init__(self, command: str, description: str | None):
        super().__init__(
            prog=f"megachiar {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )


def _in_a_config(keys: Sequence[str], how: str, value: str) -> str:
    """Return the remedy for a word that sets ``keys`` of a config, of which a user has given ``value``."""
    if not keys:
        return how
    written = " or ".join(f"--{key}={value if value and not how else 'VALUE'}" for key in keys)
    return f"it is a key of the config: write {written}{f' ({how})' if how else ''}"


class _Store(argparse.Action):
    """Store a value, or for an option of several values those of all its uses, where argparse keeps the last ones."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if option_string is not None and self.nargs in ("+", "*"):
            earlier = getattr(namespace, self.dest)
            values = values if earlier is self.default else [*earlier, *values]
        setattr(namespace, self.dest, values)


def add_config_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add ``--config`` and ``--set``; the namespace has ``config``, None where it was left out, and ``overrides``."""
    parser.add_argument("--config", type=Path, required=required, metavar="YAML", help="config of the run")
    add_set_option(parser, "override keys of the config, such as training.steps=10; --training.steps=10 does the same")


def add_set_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--set``; the namespace has ``overrides``."""
    parser.add_argument("--set", metavar="KEY=VALUE", dest="overrides", nargs="+", default=[], help=what)


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``run``: a run folder or one of its checkpoints."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder (its newest step), or one checkpoint of it")


def add_step_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--step``; the namespace has ``step``, None where it was left out."""
    parser.add_argument(
        "--step", type=number(int, least=0), metavar="N", help="the run's checkpoint of this step (default: its newest)"
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--dtype``, the type in which a run's weights are used."""
    parser.add_argument("--dtype", choices=PRECISIONS, help="type of the weights (default: that of the run)")


def add_listen_options(parser: argparse.ArgumentParser, port: int, allowed: str) -> None:
    """Add the address at which a server listens.

    Args:
        parser: of the command.
        port: that it takes by default.
        allowed: help of ``--allow-host``.
    """
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument(
        "--port",
        type=number(int, least=0, most=65535),
        default=port,
        help=f"port to listen at; 0 takes a free one (default {port})",
    )
    parser.add_argument("--allow-host", nargs="+", default=[], metavar="NAME", help=allowed)


def add_sampling_options(parser: argparse.ArgumentParser, most_new: str) -> None:
    """Add how a text is continued; ``most_new`` is the help of ``--max-new-tokens``, without its default."""
    parser.add_argument("--max-new-tokens", type=number(int, least=1), default=200, help=f"{most_new} (default 200)")
    parser.add_argument(
        "--temperature", type=number(float, least=0), default=0.8, help="0 takes the likeliest token (default 0.8)"
    )
    parser.add_argument("--top-k", type=number(int, least=1), help="sample among the k likeliest tokens")
    parser.add_argument(
        "--top-p",
        type=number(float, above=0, most=1),
        help="sample among the likeliest tokens that make up this probability",
    )
