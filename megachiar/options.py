"""All commands read their command line by one parser, which has the options that several of them share.

``--set a.b=c d.e=f`` overrides keys of a config, and ``--a.b=c`` is short for ``--set a.b=c``. A later one wins.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megachiar.errors import UserError

CONFIG_KEY = re.compile(r"--[A-Za-z_]\w*(\.[\w-]+)+(?P<equals>=.*)?", re.DOTALL)


PRECISIONS = ("fp32", "bf16", "fp16")
"""The names of number formats as options take them, those of ``precision.compute``, fp32 first."""


class OptionError(UserError):
    """An option of a command makes no sense; every rank of a run has the same command line."""

    same_on_every_rank = True


class CommandParser(argparse.ArgumentParser):
    """The parser of ``megachiar COMMAND``, the same for every way to start the command.

    It differs from argparse's in two ways. An option of several values keeps the values of all its uses, and
    ``--a.b=c`` overrides a key of the config.

    Args:
        command: the name of the command.
        description: what ``--help`` prints, the docstring of the command's module.
    """

    def __init__(self, command: str, description: str | None):
        super().__init__(
            prog=f"megachiar {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for action in (None, "store"):
            self.register("action", action, _Store)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read ``args``, or the command line of the process, as ``argparse`` does.

        Raises:
            OptionError: ``--a.b`` has no value, or this command reads no config.
        """
        return super().parse_known_args(self._with_sets(sys.argv[1:] if args is None else args), namespace)

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
            raise OptionError(argument, f"sets a key of a config, and {self.prog} has no --set", "leave it out")
        if key["equals"] is None:
            raise OptionError(argument, "has no value", f"write {argument}=VALUE, or --set {argument[2:]}=VALUE")
        return f"--set={argument[2:]}"


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
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        dest="overrides",
        nargs="+",
        default=[],
        help="override keys of the config, such as training.steps=10; --training.steps=10 does the same",
    )


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument ``run``: a run folder or one of its checkpoints."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder (its newest step), or one checkpoint of it")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
