"""Measure how well a run predicts a text: token perplexity, word perplexity, bits per byte.

megachiar evaluate runs/tiny                            # on the validation sets of its config
megachiar evaluate runs/tiny --data data/shakespeare/test
megachiar evaluate runs/tiny/checkpoints/step_00000500 --data data/shakespeare/test --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megachiar.console import make_console, print_warning
from megachiar.errors import UserError
from megachiar.options import CommandParser, add_dtype_option, add_json_option, add_run_argument, number

if TYPE_CHECKING:
    from megachiar.training.classification import Classification
    from megachiar.training.evaluation import Evaluation


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("evaluate", __doc__)
    add_run_argument(parser)
    parser.add_argument("--data", type=Path, nargs="+", metavar="PREFIX", help="datasets (default: data.validation)")
    parser.add_argument("--batch-size", type=number(int, least=1), default=8, help="windows scored at once (default 8)")
    parser.add_argument("--sequence-length", type=number(int, least=1), help="tokens of a window (default: the run's)")
    add_dtype_option(parser)
    parser.add_argument("--task", metavar="NAME", help="task of a mixed run that --data is for (default: main)")
    add_json_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from rich.progress import Progress

    from megachiar.checkpoint.reading import locate_checkpoint
    from megachiar.data.sampling.examples import ExampleSet
    from megachiar.inference import loaded_run
    from megachiar.inference.loaded_run import default_device, open_for_run, with_progress
    from megachiar.inference.loading import load_model
    from megachiar.model.dtypes import DTYPES
    from megachiar.training.classification import evaluate_examples
    from megachiar.training.evaluation import evaluate

    checkpoint = locate_checkpoint(options.run, log=print_warning)
    device = default_device()
    config, model, state = load_model(checkpoint, device, DTYPES.get(options.dtype))
    task_number = loaded_run.task_named(config, options.task)
    given = {str(p): (p, task_number) for p in options.data or ()}
    datasets = given or loaded_run.sets_of_run(config)
    if not datasets:
        raise UserError(checkpoint, "its config names no validation set", "give --data PREFIX")
    length = sequence_length(options.sequence_length, config.sequence_length, config.model.max_sequence_length)
    results: dict[str, Evaluation | Classification] = {}
    for name, (prefix, of_task) in datasets.items():
        dataset = open_for_run(checkpoint, config, prefix, length, of_task)
        if isinstance(dataset, ExampleSet) and (cut := dataset.source.describe_cut(length, "the sequence length")):
            print_warning(f"{name}: {cut}")
        with Progress(console=make_console(), transient=True) as bar:
            task = bar.add_task(name, total=dataset.windows)
            advance = partial(bar.advance, task)
            if isinstance(dataset, ExampleSet):
                classify = with_progress(loaded_run.model_classify(model, device, config), advance)
                results[name] = evaluate_examples(classify, dataset, options.batch_size)
            else:
                score = with_progress(loaded_run.model_score(model, device), advance)
                results[name] = evaluate(score, dataset, options.batch_size)
    if options.json:
        values = {name: result.as_dict() for name, result in results.items()}
        only = next(iter(values.values())) if len(values) == 1 else {"datasets": values}
        print(json.dumps({"checkpoint": str(checkpoint), "step": state.step, **only}))
    else:
        print_tables(checkpoint, results)


def sequence_length(wanted: int | None, trained: int, longest: int) -> int:
    """Return the tokens of a window: ``wanted``, or else those that the run trained on."""
    if wanted is not None and wanted > longest:
        problem = f"is above the model's max_sequence_length {longest:,}"
        raise UserError(f"--sequence-length {wanted}", problem, f"give at most {longest}, or leave it out")
    return wanted or trained


def print_tables(checkpoint: Path, results: dict[str, Evaluation | Classification]) -> None:
    """Print a line for each dataset, with a dash for a measure that its manifest does not allow."""
    from rich.markup import escape
    from rich.table import Table

    from megachiar.training.evaluation import Evaluation

    texts = Table("dataset", title=str(checkpoint), title_justify="left")
    labelled = Table("dataset", title=str(checkpoint), title_justify="left")
    for name in ("tokens", "loss", "token PPL", "word PPL", "bits/byte"):
        texts.add_column(name, justify="right")
    for name in ("examples", "loss", "accuracy", "macro-F1"):
        labelled.add_column(name, justify="right")
    for name, r in results.items():
        if isinstance(r, Evaluation):
            word = f"{r.word_ppl:.2f}" if r.word_ppl else "-"
            bits = f"{r.bits_per_byte:.4f}" if r.bits_per_byte else "-"
            texts.add_row(escape(name), f"{r.tokens:,}", f"{r.loss:.4f}", f"{r.token_ppl:.2f}", word, bits)
        else:
            labelled.add_row(escape(name), f"{r.examples:,}", f"{r.loss:.4f}", f"{r.accuracy:.2%}", f"{r.macro_f1:.4f}")
    for table in (texts, labelled):
        if table.row_count:
            make_console(sys.stdout).print(table)
