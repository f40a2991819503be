"""Run the commands from nothing to a trained model, one after the other, as a newcomer would (`make quickstart`).

A step is skipped if its result exists and is newer than its inputs, so that an interrupted quickstart goes on where it
stopped. It works in the current folder, with the shipped config `tiny`. The exit code is that of the first command that
failed, 1 if the model is no better than an interpolated bigram model, and else 0.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megachiar.console import make_console
from megachiar.errors import UserError
from megachiar.options import CommandParser

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

DATA = Path("data/shakespeare")
PARTS = ("train", "valid", "test")
TOKENIZER = DATA / "tokenizer.model"
MEGACHIAR = ["-m", "megachiar"]
PROMPT = "To be, or not to be"


@dataclass(frozen=True)
class Step:
    """One command of the quickstart.

    Attributes:
        title: the command in words.
        arguments: of ``python``.
        made: files that the command makes; empty for a command that is always run.
        source: files that the command reads; it is run again where one of them is newer than those it makes.
        reads: whether the summary needs the command's standard output.
    """

    title: str
    arguments: Sequence[str]
    made: Sequence[Path] = ()
    source: Sequence[Path] = ()
    reads: bool = False

    @property
    def done(self) -> bool:
        """Whether all files that the command makes exist and are newer than those that it reads."""
        if not self.made or not all(path.exists() for path in self.made):
            return False
        newest = max((path.stat().st_mtime_ns for path in self.source if path.exists()), default=0)
        return min(path.stat().st_mtime_ns for path in self.made) >= newest

    @property
    def command(self) -> str:
        """The command as a user would type it."""
        ours = list(self.arguments[:2]) == MEGACHIAR
        return shlex.join(["megachiar", *self.arguments[2:]] if ours else ["python", *self.arguments])


class StepFailed(Exception):
    """A command failed.

    Args:
        code: to exit with, which is the command's own code, or 128 + the signal that ended it.
    """

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def steps(config: Path, vocab_size: int, run_folder: Path) -> list[Step]:
    """Return the commands of the quickstart in order, for a config with this vocabulary and run folder."""
    corpus = [DATA / f"{part}.jsonl" for part in PARTS]
    tokenizer = [*MEGACHIAR, "tokenizer", "--input", str(corpus[0]), "--vocab-size", str(vocab_size)]
    bigram = [*MEGACHIAR, "bigram", "--vocab-size", str(vocab_size), "--json"]
    for part in PARTS:
        bigram += [f"--{part}", str(DATA / part)]
    evaluate = [*MEGACHIAR, "evaluate", str(run_folder), "--data", str(DATA / "test"), "--json"]
    sample = [*MEGACHIAR, "generate", str(run_folder), "--prompt", PROMPT, "--max-new-tokens", "120"]
    return [
        Step("corpus", [*MEGACHIAR, "corpus", "--output", str(DATA)], made=corpus),
        Step(
            "tokenizer",
            [*tokenizer, "--output", str(TOKENIZER), "--overwrite"],
            made=[TOKENIZER],
            source=corpus[:1],
        ),
        *(preprocess(part) for part in PARTS),
        Step("training", [*MEGACHIAR, "pretrain", "--config", str(config)]),
        Step("bigram", bigram, reads=True),
        Step("evaluation", evaluate, reads=True),
        Step("sample", sample, reads=True),
    ]


def preprocess(part: str) -> Step:
    """Return the command that makes the dataset of a part of the corpus."""
    from megachiar.data.storage.files import bin_path, idx_path, manifest_path

    prefix, text = DATA / part, DATA / f"{part}.jsonl"
    arguments = [*MEGACHIAR, "preprocess", "--input", str(text), "--tokenizer", str(TOKENIZER), "--append-eod"]
    return Step(
        f"{part} data",
        [*arguments, "--overwrite", "--output-prefix", str(prefix)],
        made=[bin_path(prefix), idx_path(prefix), manifest_path(prefix)],
        source=[text, TOKENIZER],
    )


def run_steps(todo: Sequence[Step], console: Console) -> tuple[dict[str, str], dict[str, float]]:
    """Run each step that is not done.

    Returns:
        the standard output of each step that is read, and the seconds of each step that ran, both by title.

    Raises:
        StepFailed: a command failed, and no later one was run.
    """
    outputs: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for number, step in enumerate(todo, 1):
        head = f"[{number}/{len(todo)}] {step.title}"
        if step.done:
            console.print(f"{head}: there already, skipped ({', '.join(map(str, step.made))})", markup=False)
            continue
        console.print(head, style="bold", markup=False)
        console.print(f"$ {step.command}", markup=False)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, *step.arguments], stdout=subprocess.PIPE if step.reads else None, text=True
        )
        if done.returncode:
            code = done.returncode if done.returncode > 0 else 128 - done.returncode
            console.print(f"{head} failed with exit code {code}: {step.command}", style="bold red", markup=False)
            console.print("When that is mended, the quickstart goes on from here.", markup=False)
            raise StepFailed(code)
        seconds[step.title] = time.monotonic() - began
        console.print(f"{step.title}: {seconds[step.title]:.0f} s", style="dim", markup=False)
        if step.reads:
            outputs[step.title] = done.stdout
    return outputs, seconds


def summarise(
    outputs: dict[str, str], seconds: dict[str, float], config: Path, run_folder: Path, console: Console
) -> int:
    """Print the results and return the exit code: 0 if the model beats the bigram model, else 1."""
    bigram, model = json.loads(outputs["bigram"]), json.loads(outputs["evaluation"])
    if bigram["tokens"] != model["tokens"]:
        raise UserError(
            DATA / "test",
            f"the bigram was scored on {bigram['tokens']:,} tokens, the model on {model['tokens']:,}",
            "did the data change while this ran? start it again",
        )
    console.print("\nA sample", style="bold")
    console.print(outputs["sample"], markup=False)
    console.print(results_table(bigram, model))
    console.print("Time: " + ", ".join(f"{title} {time:.0f} s" for title, time in seconds.items()), markup=False)
    console.print("Where to look next", style="bold")
    for line in (
        f"tensorboard --logdir {run_folder.parent}      curves; the same numbers as text: {run_folder}/metrics.jsonl",
        f"megachiar generate {run_folder} --prompt 'Shall I'      more samples",
        f"{config}      the whole run in one file; a baseline: --set model.kind=baseline logging.folder=runs/baseline",
        'README.md, "Train on your own text"',
    ):
        console.print(f"  {line}", markup=False)
    if model["token_ppl"] < bigram["token_ppl"]:
        return 0
    console.print("The model is no better than the bigram model: it did not learn what it should.", style="bold red")
    return 1


def results_table(bigram: dict, model: dict) -> Table:
    """Return a table of both models. They score the same tokens, so the bigram's numbers follow from its perplexity."""
    from rich.table import Table

    ratio = math.log(bigram["token_ppl"]) / math.log(model["token_ppl"])
    table = Table(title=f"Held-out text ({model['tokens']:,} tokens, {DATA / 'test'})", title_justify="left")
    for name in ("model", "token PPL", "bits/byte", "word PPL"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, values, power in (
        (f"CHIAR-Former, step {model['step']:,}", model, 1.0),
        ("interpolated bigram", bigram, ratio),
    ):
        bits, word = model["bits_per_byte"] * power, model["word_ppl"] ** power
        table.add_row(name, f"{values['token_ppl']:.2f}", f"{bits:.3f}", f"{word:,.0f}")
    return table


def find_config() -> Path:
    """Return the config that is trained: that of a checkout, or a copy of the shipped one in the current folder."""
    for path in (Path("configs/tiny.yaml"), Path("tiny.yaml")):
        if path.exists():
            return path

    from megachiar.config.copies import copy_shipped_config

    return copy_shipped_config("tiny", Path()).path


def main(argv: Sequence[str] | None = None) -> int:
    CommandParser("quickstart", __doc__).parse_args(argv)

    from megachiar.config import load_config

    path, console = find_config(), make_console()
    config = load_config(path)
    folder = Path(config.logging.folder)
    try:
        outputs, seconds = run_steps(steps(path, config.model.vocab_size, folder), console)
    except StepFailed as failure:
        return failure.code
    return summarise(outputs, seconds, path, folder, console)
