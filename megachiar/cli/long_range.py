"""Measure what runs keep over a distance: answers by distance, or the loss of any text by position.

megachiar long-range runs/long-range --data data/recall/test
megachiar long-range runs/sweeps/long_range/*/seed_1 --data data/recall/test --json
megachiar long-range runs/tiny --data data/shakespeare/valid --by position

By distance it takes datasets of `megachiar corpus recall`, copy, needle and listops-distance, beside the lines that
they were made of. Several runs are shown beside each other. docs/long-range.md tells how to read the numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megachiar.console import make_console, print_warning
from megachiar.errors import UserError
from megachiar.options import CommandParser, OptionError, add_dtype_option, add_json_option, number

if TYPE_CHECKING:
    from megachiar.analysis.long_range import Accuracy, Measured, PositionLoss
    from megachiar.inference.language_model import LanguageModel


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("long-range", __doc__)
    runs = "run folders (their newest step), or checkpoints"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=runs)
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="PREFIX", help="datasets")
    by = "distance of answers, or position in windows of any text (default: %(default)s)"
    parser.add_argument("--by", choices=("distance", "position"), default="distance", help=by)
    lines = "the lines that the dataset was made of (default: PREFIX.jsonl)"
    parser.add_argument("--answers", type=Path, metavar="FILE", help=lines)
    parser.add_argument("--batch-size", type=number(int, least=1), default=32, help="sequences read at once (32)")
    window = "tokens of a window, by position (default: the run's)"
    parser.add_argument("--sequence-length", type=number(int, least=1), help=window)
    add_dtype_option(parser)
    add_json_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    check_options(options)
    results = [result for run in options.runs for result in measure_run(run, options)]
    if options.json:
        values = [result.as_dict() for result in results]
        print(json.dumps({"by": options.by, **(values[0] if len(values) == 1 else {"results": values})}))
        return
    for data in options.data:
        print_table([result for result in results if result.data == data])


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that have no effect, or too many files.

    Raises:
        OptionError: an option is not for this measure.
    """
    if options.by == "distance" and options.sequence_length is not None:
        remedy = "leave it out, or give --by position"
        raise OptionError("--sequence-length", "has no effect by distance: each document is read whole", remedy)
    if options.answers is not None and (options.by == "position" or len(options.data) > 1):
        problem = "has no effect by position" if options.by == "position" else "is for one dataset"
        raise OptionError("--answers", problem, "leave it out, or give one --data by distance")


def measure_run(run: Path, options: argparse.Namespace) -> list[Measured]:
    """Return what was measured of a run on each dataset.

    Raises:
        UserError: the run is no language model or cannot read a dataset, or a dataset is damaged or has no answers.
    """
    from megachiar.inference.language_model import LanguageModel

    model = LanguageModel.load(run, options.dtype, log=print_warning)
    measure = by_distance if options.by == "distance" else by_position
    return [measure(model, data, options) for data in options.data]


def by_distance(model: LanguageModel, data: Path, options: argparse.Namespace) -> Measured:
    """Return the accuracy of a run on a dataset by distance."""
    from megachiar.analysis.long_range import Measured, accuracy_by_distance, accuracy_of, measure_answers
    from megachiar.data.tasks.answered import AnsweredSet
    from megachiar.progress import CountProgress

    longest = model.config.model.max_sequence_length
    dataset = AnsweredSet(model.open_text(data).source, options.answers)
    dataset.check_length(longest)
    with CountProgress("answering", dataset.documents, "documents") as progress:
        answers = measure_answers(model.predict, dataset, options.batch_size, progress.advance)
    return Measured(model.checkpoint, model.step, data, accuracy_of(answers), accuracy_by_distance(answers))


def by_position(model: LanguageModel, data: Path, options: argparse.Namespace) -> Measured:
    """Return the loss of a run on a text by position."""
    from megachiar.analysis.long_range import Measured, loss_by_position, mean_loss
    from megachiar.progress import CountProgress

    length, longest = options.sequence_length, model.config.model.max_sequence_length
    if length is not None and length > longest:
        problem = f"is above the model's max_sequence_length {longest:,}"
        raise UserError(f"--sequence-length {length}", problem, f"give at most {longest}, or leave it out")
    dataset = model.open_text(data, length)
    with CountProgress("scoring", dataset.windows, "windows") as progress:
        parts = loss_by_position(model.token_losses, dataset, options.batch_size, progress.advance)
    return Measured(model.checkpoint, model.step, data, mean_loss(parts), parts)


def print_table(results: Sequence[Measured]) -> None:
    """Print what was measured on one dataset: one run with all numbers, or several runs beside each other."""
    from rich.markup import escape
    from rich.table import Table

    from megachiar.analysis.long_range import Accuracy

    first = results[0]
    is_accuracy = isinstance(first.total, Accuracy)
    what = "accuracy by distance" if is_accuracy else "loss by position"
    if len(results) == 1:
        table = Table(title=escape(f"{first.checkpoint} on {first.data}"), title_justify="left")
        names = ("distance", "answers", "accuracy", "95 %", "loss", "error")
        for name in names if is_accuracy else ("position", "tokens", "loss", "error"):
            table.add_column(name, justify="right")
        for part in first.parts:
            table.add_row(*row_of(part, _octave(part.least, part.most)))
        table.add_section()
        table.add_row(*(row_of(first.total, "all") if isinstance(first.total, Accuracy) else _total(first)))
    else:
        table = Table("run", title=escape(f"{what}, {first.data}"), title_justify="left")
        octaves = sorted({(part.least, part.most) for result in results for part in result.parts})
        for least, most in octaves:
            table.add_column(_octave(least, most), justify="right")
        table.add_column("all", justify="right")
        for result in results:
            shown = {(part.least, part.most): _short(part) for part in result.parts}
            total = f"{result.total:.4f}" if isinstance(result.total, float) else _short(result.total)
            run = (
                result.checkpoint.parent.parent if result.checkpoint.parent.name == "checkpoints" else result.checkpoint
            )
            table.add_row(escape(str(run)), *(shown.get(octave, "") for octave in octaves), total)
    make_console(sys.stdout).print(table)


def row_of(part: Accuracy | PositionLoss, name: str) -> list[str]:
    """Return the cells of a row of the table of one run."""
    from megachiar.analysis.long_range import Accuracy

    error = "-" if part.loss_error is None else f"{part.loss_error:.4f}"
    if not isinstance(part, Accuracy):
        return [name, f"{part.tokens:,}", f"{part.loss:.4f}", error]
    interval = f"{100 * part.low:.2f} to {100 * part.high:.2f} %"
    return [name, f"{part.answers:,}", f"{part.accuracy:.2%}", interval, f"{part.loss:.4f}", error]


def _total(result: Measured) -> list[str]:
    """Return the last row of the table of losses."""
    from megachiar.analysis.long_range import PositionLoss

    tokens = sum(part.tokens for part in result.parts if isinstance(part, PositionLoss))
    return ["all", f"{tokens:,}", f"{result.total:.4f}", ""]


def _short(part: Accuracy | PositionLoss) -> str:
    from megachiar.analysis.long_range import Accuracy

    return f"{part.accuracy:.1%}" if isinstance(part, Accuracy) else f"{part.loss:.4f}"


def _octave(least: int, most: int) -> str:
    return f"{least}" if least == most else f"{least}-{most}"
