"""The console command ``megachiar`` finds the command on its command line and starts it.

No other command is imported, so that help and version are printed at once.
"""

from __future__ import annotations

import difflib
import importlib
import keyword
import sys
from collections.abc import Sequence

import megachiar
from megachiar import launch
from megachiar.checkout import own_commit
from megachiar.console import run
from megachiar.options import OptionError

GROUPS = {
    "Data": {
        "corpus": "fetch a corpus to start with",
        "tokenizer": "train a tokenizer on a corpus",
        "preprocess": "tokenize a corpus into a dataset (.bin, .idx and a manifest)",
        "merge": "join datasets of one tokenizer",
        "inspect": "show and verify a dataset, or the samples of a step",
    },
    "Training": {
        "quickstart": "go from nothing to a trained model in minutes, on a CPU",
        "config": "list, show and copy the shipped configs",
        "plan": "list the layouts that fit a config into a cluster",
        "pretrain": "train as a config says",
        "monitor": "watch runs in the terminal while they train",
        "page": "write the page of a run: curves, config, events, routes",
        "compare": "compare runs, as table and page",
        "sweep": "train variants of a config over seeds, and compare them",
        "replay": "repeat a step on the CPU and name the first bad module",
        "stacks": "show where all ranks of a run are at the moment",
    },
    "Trained models": {
        "checkpoint": "list, verify, show, compare and remove checkpoints",
        "evaluate": "measure perplexity and bits per byte on a dataset",
        "long-range": "measure answers by distance, and the loss by position",
        "generate": "sample text",
        "chat": "continue texts that you type",
        "serve": "serve a run by OpenAI's completions protocol",
        "routes": "show which operator each token of a text takes",
        "demo": "show routes live in a browser",
        "calibrate": "find thresholds for the router",
        "bigram": "measure the perplexity of a bigram model, to compare with",
        "report": "make tables and figures of runs, and one HTML page",
        "analyze-routing": "say whether the router knows anything, with error bars",
        "flips": "count the tokens that 16 bits route otherwise than fp32",
        "import": "make a run of a checkpoint of the published code",
        "export": "write a checkpoint of the published code from a run",
    },
    "Benchmarks": {
        "bench-train": "time training steps, beside the baseline and other programs",
        "bench-layers": "time layers and operators",
        "bench-data": "time the data tools, beside Megatron-LM's",
        "bench-decode": "time generation, beside a full pass a token and transformers",
        "bench-checkpoint": "time the saving of checkpoints",
        "bench-dropout": "time keyed dropout, beside torch's",
        "bench-device": "check and time a GPU in minutes: tests, layers, steps",
    },
}
COMMANDS = {command: summary for group in GROUPS.values() for command, summary in group.items()}
ELSEWHERE = {"pretrain": "megachiar.pretrain"}  # launchers start this file


def start() -> None:
    """Run the command line of this process and exit."""
    run(main)


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run a command line.

    Returns:
        the exit code, None for 0.

    Raises:
        UserError: there is no such command, or the command itself refuses something.
    """
    first, *rest = launch.drop_launcher_arguments(sys.argv[1:] if argv is None else argv) or ["--help"]
    if first in ("--help", "-h"):
        print(help_text())
    elif first == "--version":
        print(version_text())
    elif first not in COMMANDS:
        raise OptionError(f"megachiar {first}", "there is no such command", nearest_command(first))
    else:
        return importlib.import_module(module_of(first)).main(rest)
    return None


def module_of(command: str) -> str:
    """Return the module of a command; one that is a word of Python, as ``import``, has an underscore after it."""
    name = command.replace("-", "_")
    return ELSEWHERE.get(command, f"megachiar.cli.{name}_" if keyword.iskeyword(name) else f"megachiar.cli.{name}")


def nearest_command(word: str) -> str:
    """Return the remedy for a word that is no command."""
    near = difflib.get_close_matches(word.lstrip("-"), COMMANDS, n=1, cutoff=0.5)
    meant = f"did you mean `megachiar {near[0]}`? " if near else ""
    return f"{meant}`megachiar --help` lists all commands"


def help_text() -> str:
    """Return the text of ``megachiar --help``."""
    lines = ["usage: megachiar COMMAND ...", "", "Pretrain CHIAR-Former language models, from a laptop to a cluster."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {command:17} {summary}" for command, summary in commands.items())]
    lines += ["", "megachiar COMMAND --help   the options of a command", "megachiar --version        the version"]
    return "\n".join(lines)


def version_text() -> str:
    """Return the version and, in a checkout, its commit; ``-dirty`` means that files have changed since."""
    commit = own_commit()
    return f"megachiar {megachiar.__version__}" + (f" (commit {commit})" if commit else "")
