"""Measure how well a run predicts a text, or what it scores on tasks of lm-evaluation-harness.

megachiar evaluate runs/tiny                            # on the validation sets of its config
megachiar evaluate runs/tiny --data data/shakespeare/test
megachiar evaluate runs/tiny/checkpoints/step_00000500 --data data/shakespeare/test --json
megachiar evaluate runs/tiny --tasks cloze,riddles --include-path tasks --output results.json
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
    add_task_options(parser)
    options = parser.parse_args(argv)
    check_together(options)
    return options


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of lm-evaluation-harness, by the names that it has for them."""
    group = parser.add_argument_group("tasks of lm-evaluation-harness (pip install 'megachiar[eval]')")
    group.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks, groups or YAML files, separated by commas")
    group.add_argument("--include-path", type=Path, metavar="FOLDER", help="folder with YAML files of more tasks")
    group.add_argument("--num-fewshot", type=number(int, least=0), metavar="N", help="examples before each question")
    group.add_argument(
        "--limit", type=number(float, above=0), metavar="N", help="documents of each task, or a share of them below 1"
    )
    group.add_argument("--output", type=Path, metavar="FILE.json", help="write the results as lm_eval's file has them")
    group.add_argument("--log-samples", action="store_true", help="write each document beside FILE.json too")
    group.add_argument("--apply-chat-template", action="store_true", help=argparse.SUPPRESS)


def check_together(options: argparse.Namespace) -> None:
    """Check that the options given are all of one kind.

    Raises:
        UserError: an option belongs to the other kind of evaluation, or lacks what it needs.
    """
    of_tasks = ("include_path", "num_fewshot", "limit", "output", "log_samples", "apply_chat_template")
    of_texts = ("data", "sequence_length", "task")
    given, wrong = ("without", of_tasks) if options.tasks is None else ("with", of_texts)
    for name in wrong:
        if getattr(options, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            problem = f"is given {given} --tasks"
            remedy = "name tasks by --tasks" if options.tasks is None else "leave one of the two out"
            raise UserError(option, problem, remedy)
    if options.log_samples and options.output is None:
        raise UserError("--log-samples", "is given without --output", "name a file by --output: samples go beside it")
    if options.limit is not None and options.limit > 1 and options.limit != int(options.limit):
        raise UserError(f"--limit {options.limit:g}", "is no whole number of documents", "give one, or a share below 1")


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    if options.tasks is not None:
        evaluate_tasks(options)
    else:
        evaluate_texts(options)


def evaluate_tasks(options: argparse.Namespace) -> None:
    """Print the harness's table, or its results with ``--json``, and write them with ``--output``."""
    from megachiar.evaluation.harness_library import check_library

    check_library("--tasks")
    from rich.progress import Progress

    from megachiar.data.storage.files import check_writable
    from megachiar.evaluation.harness_tasks import TaskSettings
    from megachiar.evaluation.measure import (
        MeasureOptions,
        measure_tasks,
        results_json,
        results_table,
        write_results,
    )
    from megachiar.evaluation.text_model import no_chat_template

    if options.apply_chat_template:
        raise no_chat_template()
    if options.output is not None:
        check_writable(options.output, f"--output {options.output}")
    limit = int(options.limit) if options.limit is not None and options.limit >= 1 else options.limit
    names = [name for given in options.tasks for name in given.split(",") if name]
    settings = TaskSettings(names, options.include_path, options.num_fewshot, limit)
    how = MeasureOptions(options.batch_size, options.dtype, options.log_samples)
    with Progress(console=make_console(), transient=True) as bar:
        shown = bar.add_task("loads tasks", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(shown, description=what, completed=done, total=total)

        results = measure_tasks(options.run, settings, how, print_warning, progress)
    if options.output is not None:
        for path in write_results(results, options.output):
            make_console().print(f"written: {path}", markup=False)
    print(results_json(results) if options.json else results_table(results))


def evaluate_texts(options: argparse.Namespace) -> None:
    """Print what the run says of datasets: those named, or the validation sets of its config."""
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
