"""Say whether the router of a run knows anything: its routes beside chance, and what they are worth, with intervals.

megachiar analyze-routing runs/tiny --data data/shakespeare/valid
megachiar analyze-routing runs/tiny --baseline runs/baseline --json routing.json --csv routing.csv
megachiar analyze-routing runs/400m --sequences 256 --switches 1024 --batch-size 32

docs/analyzing-routing.md tells how to read each number. Models are read in fp32.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachiar.console import make_console, print_warning
from megachiar.errors import UserError
from megachiar.options import CommandParser, add_run_argument, number

if TYPE_CHECKING:
    import numpy as np

    from megachiar.analysis.routing_analysis import SavedStep, Subject, Text
    from megachiar.analysis.routing_findings import Finding
    from megachiar.model import ChiarFormer

SECTIONS = {
    "shares": "Which operator takes how many tokens",
    "entropy": "Spectral entropy H beside that of white noise",
    "channels": "Would the router decide alike if the channels stood in another order?",
    "information": "What explains the routes (0 chance, 1 all)",
    "loss": "Next-token loss, nats",
    "distance": "How far back a baseline's attention looks",
    "stability": "Do tokens keep their routes? (0 chance, 1 all)",
    "value": "What a single route is worth: loss with DCT mixing minus loss with attention, nats",
    "predictors": "What would predict it: the regret of a router by each (0 the oracle, 1 a coin)",
    "other routes": "Loss with other routes minus loss with its own, nats a token",
}
COLUMNS = ("section", "layer", "measure", "value", "low", "high", "chance", "chance_low", "chance_high", "verdict")
LEAST_SEQUENCES = 4
COUNTED_TOKENS = 10_000_000
"""Tokens of the text that frequencies are counted in, at most."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("analyze-routing", __doc__)
    add_run_argument(parser)
    data = "dataset (default: the run's first validation set, or else its first source)"
    parser.add_argument("--data", type=Path, metavar="PREFIX", help=data)
    baseline = "attention-only run of the same tokenizer, for attention distances"
    parser.add_argument("--baseline", type=Path, metavar="RUN", help=baseline)
    for name, default, least, text in (
        ("sequences", 64, LEAST_SEQUENCES, "windows that are read"),
        ("switches", 256, 0, "tokens whose route is switched in each routed layer; 0 for none"),
        ("permutations", 16, 2, "orders of the channels that are tried"),
        ("checkpoints", 6, 0, "checkpoints of the run whose routes are compared; 0 for none"),
        ("seed", 0, 0, "of all that is drawn"),
    ):
        limits = number(int, least=least, most=2**62)
        parser.add_argument(f"--{name}", type=limits, default=default, help=f"{text} (%(default)s)")
    size = "sequences of a forward pass (default: training.micro_batch_size)"
    parser.add_argument("--batch-size", type=number(int, least=1), help=size)
    written = "write all numbers as JSON; - prints them in place of the tables"
    parser.add_argument("--json", metavar="FILE", help=written)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write one line a number")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.data.storage.files import check_writable

    left_out: list[str] = []
    for path in (None if options.json in (None, "-") else Path(options.json), options.csv):
        if path is not None:
            check_writable(path)
    subject = open_subject(options.run, options.data)
    text = read_text(subject, options.sequences, left_out)
    findings = measure(subject, text, options, left_out)

    from megachiar.analysis.routing_analysis import verdicts

    sentences = verdicts(findings)
    record = {
        "run": str(subject.run),
        "step": subject.step,
        "data": str(subject.data),
        "router": subject.config.model.router.kind,
        "baseline": str(options.baseline) if options.baseline else None,
        "sequences": len(text.windows.inputs),
        "tokens": int(text.windows.inputs.size),
        "switches": options.switches,
        "permutations": options.permutations,
        "seed": options.seed,
        "verdicts": {str(layer): sentence for layer, sentence in sentences.items()},
        "left_out": left_out,
        "findings": [finding.as_dict() for finding in findings],
    }
    write_files(record, options.json, options.csv)
    if options.json != "-":
        windows = f"{len(text.windows.inputs)} windows of {subject.data}, seed {options.seed}"
        print_report(findings, sentences, left_out, f"{subject.run} at step {subject.step:,}, {windows}")


def measure(subject: Subject, text: Text, options: argparse.Namespace, left_out: list[str]) -> list[Finding]:
    """Return the findings about a model; what could not be measured is added to ``left_out``."""
    from megachiar.analysis.attention_distance import attention_distances
    from megachiar.analysis.routing_analysis import Settings, analyze_routing, sequences_to_run
    from megachiar.progress import CountProgress

    router, training = subject.config.model.router, subject.config.training
    settings = Settings(
        switches=options.switches,
        permutations=options.permutations,
        batch_size=options.batch_size or training.micro_batch_size,
        seed=options.seed,
    )
    steps = saved_steps(options.run, options.checkpoints, left_out)
    baseline = open_baseline(options.baseline, subject, text) if options.baseline else None
    if baseline is None:
        left_out.append("attention distances, which need --baseline RUN")
    if subject.config.model.attention.keys == "routed":
        left_out.append("predictors of values: with attention.keys routed a token's keys depend on its route, too")
    if router.kind == "soft":
        left_out.append("values of routes: a soft router gives every token all operators")
    layers = len(subject.config.model.routed_layers)
    total = sequences_to_run(text, settings, layers, len(steps), router.kind == "soft")
    with CountProgress("analysing", total + (baseline is not None) * len(text.windows.inputs), "sequences") as progress:
        distances = None
        if baseline is not None:
            distances = attention_distances(baseline, text.windows, settings.batch_size, progress.advance)
        return analyze_routing(
            subject.model, text, settings, steps=steps, distances=distances, advance=progress.advance
        )


def open_subject(run: Path, data: Path | None) -> Subject:
    """Load the model of a run in fp32.

    Raises:
        UserError: there is no run, or it is a classification, or has no layer that routes.
    """
    from megachiar.analysis.routing_analysis import Subject
    from megachiar.checkpoint.reading import locate_checkpoint
    from megachiar.inference.loaded_run import default_device
    from megachiar.inference.loading import load_model
    from megachiar.model.dtypes import DTYPES

    checkpoint = locate_checkpoint(run, log=print_warning)
    config, model, state = load_model(checkpoint, default_device(), DTYPES["fp32"])
    if config.tasks[0].head is not None:
        raise UserError(run, "learns classes, and has no loss of a next token", "name a run of a language model")
    if not config.model.routed_layers:
        raise UserError(run, "has no layer that routes", "name a run of a CHIAR model of 3 layers or more")
    validation = next(iter(dict(config.data.validation).values()), None)
    prefix = Path(data or validation or config.data.train[0].path)
    return Subject(run=run, checkpoint=checkpoint, config=config, model=model, step=state.step, data=prefix)


def read_text(subject: Subject, sequences: int, left_out: list[str]) -> Text:
    """Read windows of the dataset, and the kinds of their words where the run has a tokenizer.

    Raises:
        UserError: the dataset is of another tokenizer, or shorter than ``LEAST_SEQUENCES`` windows.
    """
    from megachiar.analysis.routing_analysis import Text
    from megachiar.analysis.windows import spread_windows, token_counts
    from megachiar.inference.loaded_run import open_text_for_run

    dataset = open_text_for_run(subject.checkpoint, subject.config, subject.data)
    windows = spread_windows(dataset, sequences)
    if len(windows.inputs) < LEAST_SEQUENCES:
        problem = (
            f"has {len(windows.inputs)} windows of {dataset.sequence_length} tokens; intervals need {LEAST_SEQUENCES}"
        )
        raise UserError(subject.data, problem, "give a longer text with --data")
    counts = token_counts(dataset.source, subject.config.model.vocab_size, COUNTED_TOKENS)
    return Text(windows=windows, counts=counts, words=word_kinds(subject, windows.inputs, left_out))


def word_kinds(subject: Subject, inputs: np.ndarray, left_out: list[str]) -> np.ndarray | None:
    """Return the kind of each token (S, T), or None where the run's tokenizer is gone."""
    from megachiar.analysis.token_features import word_classes
    from megachiar.training.run_tokenizer import run_tokenizer

    try:
        return word_classes(run_tokenizer(subject.checkpoint, subject.config), inputs)
    except UserError as error:
        left_out.append(f"kinds of words ({error})")
        return None


def saved_steps(run: Path, count: int, left_out: list[str]) -> list[SavedStep]:
    """Return at most ``count`` checkpoints of a run folder, spread evenly, the first and the last among them."""
    import numpy as np

    from megachiar.analysis.routing_analysis import SavedStep
    from megachiar.checkpoint.format import complete_checkpoints, read_state
    from megachiar.checkpoint.reading import folders_of_checkpoints, is_checkpoint, locate_checkpoint
    from megachiar.inference.loaded_run import default_device
    from megachiar.inference.loading import load_model
    from megachiar.model.dtypes import DTYPES

    def loader(path: Path) -> Callable[[], ChiarFormer]:
        return lambda: load_model(locate_checkpoint(path), default_device(), DTYPES["fp32"])[1]

    if count == 0:
        return []
    folders = () if is_checkpoint(run) else folders_of_checkpoints(run)
    found = next(filter(None, map(complete_checkpoints, folders)), [])
    if len(found) < 2 or count < 2:
        left_out.append("routes over the run, which need a run folder with two checkpoints or more")
        return []
    chosen = np.unique(np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)).tolist()
    return [SavedStep(step=read_state(found[place]).step, load=loader(found[place])) for place in chosen]


def open_baseline(run: Path, subject: Subject, text: Text) -> ChiarFormer:
    """Load the baseline whose attention distances are compared with H.

    Raises:
        UserError: it routes, learns classes, reads shorter sequences, or was trained with another tokenizer.
    """
    from megachiar.checkpoint.reading import locate_checkpoint
    from megachiar.inference.loaded_run import default_device, open_text_for_run
    from megachiar.inference.loading import load_model
    from megachiar.model.dtypes import DTYPES

    checkpoint = locate_checkpoint(run, log=print_warning)
    config, model, _ = load_model(checkpoint, default_device(), DTYPES["fp32"])
    if config.model.kind != "baseline":
        raise UserError(f"--baseline {run}", f"is a {config.model.kind} model", "give a run with model.kind: baseline")
    if config.tasks[0].head is not None:
        raise UserError(f"--baseline {run}", "learns classes, and reads no windows of a text", "name a language model")
    length, longest = text.windows.inputs.shape[1], config.model.max_sequence_length
    if length > longest:
        problem = f"reads at most {longest:,} tokens, and the windows have {length:,}"
        raise UserError(f"--baseline {run}", problem, "give a baseline of the run's sequence length")
    open_text_for_run(checkpoint, config, subject.data, length)
    return model


def write_files(record: dict[str, Any], json_file: str | None, csv_file: Path | None) -> None:
    """Write what was asked for, each file whole or not at all.

    Raises:
        UserError: a file cannot be written.
    """
    from megachiar.data.storage.files import write_atomically

    if json_file == "-":
        print(json.dumps(record))
    elif json_file is not None:
        write_atomically(Path(json_file), (json.dumps(record, indent=1) + "\n").encode())
    if csv_file is not None:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(record["findings"])
        write_atomically(csv_file, text.getvalue().encode())


def print_report(findings: Sequence[Finding], sentences: dict[int, str], left_out: Sequence[str], title: str) -> None:
    """Print a table for each section, a sentence for each layer, and what was not measured."""
    from rich.markup import escape
    from rich.table import Table

    console = make_console(sys.stdout)
    console.print(title, style="bold", markup=False)
    for section, heading in SECTIONS.items():
        of_section = [finding for finding in findings if finding.section == section]
        if not of_section:
            continue
        table = Table(title=heading, title_justify="left", title_style="bold")
        for name in ("layer", "measure", "value", "95 % interval", "chance", "verdict"):
            table.add_column(name, justify="left" if name in ("measure", "verdict") else "right")
        for finding in of_section:
            table.add_row(
                "all" if finding.layer is None else str(finding.layer),
                escape(finding.measure),
                _number(finding.value),
                _interval(finding.low, finding.high),
                f"{_number(finding.chance)} {_interval(finding.chance_low, finding.chance_high)}".strip(),
                escape(finding.verdict),
            )
        console.print(table)
    console.print("In short", style="bold")
    for number_of_layer, sentence in sentences.items():
        console.print(f"layer {number_of_layer}: {sentence}.", markup=False)
    for line in left_out:
        console.print(f"Not measured: {line}.", markup=False)


def _number(value: float) -> str:
    """Return a number in a table; nothing for one that does not exist."""
    if value != value:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def _interval(low: float, high: float) -> str:
    return f"[{_number(low)}, {_number(high)}]" if low == low and high == high else ""
