"""From nothing to a trained model: the commands a newcomer would type, run one after the other (`make quickstart`).

A step whose result is there already is skipped, so that a quickstart that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megachiar.config import load_config
from megachiar.console import make_console, run
from megachiar.data.files import bin_path, idx_path, manifest_path

CONFIG, DATA = "configs/tiny.yaml", Path("data/shakespeare")
TOKENIZER = DATA / "tokenizer.model"
PROMPT = "ROMEO.\nWhat light is this"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        title: what it does.
        arguments: after ``python``.
        made: files that say it has been done; none for a step that is always run.
        reads: whether its standard output is a JSON object or text that the summary needs.
    """

    title: str
    arguments: Sequence[str]
    made: Sequence[Path] = ()
    reads: bool = False

    @property
    def done(self) -> bool:
        return bool(self.made) and all(path.exists() for path in self.made)


class StepFailed(Exception):
    """A command ended with an exit code other than 0."""

    def __init__(self, code: int):
        self.code = code


def steps() -> list[Step]:
    """The quickstart, in order."""
    config = load_config(CONFIG)
    folder = str(config.logging.folder)
    corpus = [DATA / f"{part}.jsonl" for part in ("train", "valid", "test")]
    vocabulary = str(config.model.vocab_size)
    train_tokenizer = ["tools/train_tokenizer.py", "--input", str(corpus[0]), "--vocab-size", vocabulary]
    baseline = ["tools/bigram_baseline.py", "--json"]
    for part in ("train", "valid", "test"):
        baseline += [f"--{part}", str(DATA / part)]
    return [
        Step("corpus", ["tools/get_corpus.py", "--output", str(DATA)], made=corpus),
        Step("tokenizer", [*train_tokenizer, "--output", str(TOKENIZER)], made=[TOKENIZER]),
        *(preprocess(part) for part in ("train", "valid", "test")),
        Step("training", ["-m", "megachiar.pretrain", "--config", CONFIG]),
        Step("bigram", baseline, reads=True),
        Step("evaluation", ["tools/evaluate.py", folder, "--data", str(DATA / "test"), "--json"], reads=True),
        Step("sample", ["tools/generate.py", folder, "--prompt", PROMPT, "--max-new-tokens", "120"], reads=True),
    ]


def preprocess(part: str) -> Step:
    prefix = DATA / part
    arguments = ["tools/preprocess_data.py", "--input", f"{prefix}.jsonl", "--tokenizer", str(TOKENIZER)]
    arguments += ["--append-eod", "--workers", "2", "--overwrite", "--output-prefix", str(prefix)]
    return Step(f"{part} data", arguments, made=[bin_path(prefix), idx_path(prefix), manifest_path(prefix)])


def run_steps(todo: Sequence[Step], console) -> dict[str, str]:
    """Run each step that is not done; returns the standard output of those that are read, by title.

    Raises:
        StepFailed: a command failed; nothing after it was run.
    """
    outputs = {}
    for number, step in enumerate(todo, 1):
        head = f"[bold][{number}/{len(todo)}] {step.title}[/]"
        if step.done:
            console.print(f"{head}: there already ({', '.join(map(str, step.made))})")
            continue
        console.print(f"{head}\n$ python {shlex.join(step.arguments)}", markup=True)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, *step.arguments], stdout=subprocess.PIPE if step.reads else None, text=True
        )
        if done.returncode:
            console.print(f"[bold red]{step.title} failed with exit code {done.returncode}[/]")
            raise StepFailed(done.returncode)
        console.print(f"  {time.monotonic() - began:.0f} s")
        if step.reads:
            outputs[step.title] = done.stdout
    return outputs


def summarise(outputs: dict[str, str], folder: Path, console) -> int:
    """Print what came out; 0 if the model beats the bigram model, else 1."""
    bigram, model = json.loads(outputs["bigram"]), json.loads(outputs["evaluation"])
    console.print(f"\n[bold]sample[/]\n{outputs['sample']}", markup=True)
    better = model["token_ppl"] < bigram["token_ppl"]
    console.print("[bold]on plays it has never seen[/]")
    console.print(f"  CHIAR-Former         test token PPL {model['token_ppl']:8.2f}   (step {model['step']})")
    console.print(f"  interpolated bigram  test token PPL {bigram['token_ppl']:8.2f}   the same tokens")
    console.print(f"  word PPL {model['word_ppl']:.1f}, {model['bits_per_byte']:.3f} bits per byte")
    console.print("[bold]where to look next[/]")
    console.print(f"  {folder}/metrics.jsonl, and curves: tensorboard --logdir {folder}")
    console.print(f"  sample more: python tools/generate.py {folder} --prompt 'To be, or'")
    console.print("  your own text and bigger models: README.md")
    if not better:
        console.print(
            "[bold red]the model is no better than the bigram model: this should not happen, please tell us[/]"
        )
    return 0 if better else 1


def main() -> int:
    console = make_console()
    try:
        outputs = run_steps(steps(), console)
    except StepFailed as failure:
        return failure.code
    return summarise(outputs, load_config(CONFIG).logging.folder, console)


if __name__ == "__main__":
    run(main)
