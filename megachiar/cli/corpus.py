"""Fetch a corpus to start with: train.jsonl, valid.jsonl and test.jsonl, with whole works held out.

megachiar corpus --output data/shakespeare                            # Shakespeare and Milton, 6.5 MB
megachiar corpus --source wikitext-103 --output data/wikitext-103     # needs the extra hf and a network

Each line is {"text", "work", "edition"}. Without a network the first command takes 0.4 MB of English text that every
Python installation has, and says so. A command that was done before does nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megachiar.console import make_console
from megachiar.data.preprocessing.choices import WIKITEXT
from megachiar.options import CommandParser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("corpus", __doc__)
    parser.add_argument(
        "--source",
        choices=("shakespeare", *WIKITEXT),
        default="shakespeare",
        help="which corpus (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the files are written")
    parser.add_argument("--overwrite", action="store_true", help="replace files that hold another text")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options, console = parse_arguments(argv), make_console()

    from megachiar.data.preprocessing.corpus import get_corpus
    from megachiar.data.preprocessing.existing import SAME

    def say(line: str) -> None:
        console.print(line, markup=False)

    report = get_corpus(options.source, options.output, say, overwrite=options.overwrite)
    for part, (documents, size) in report.counts.items():
        say(f"{options.output / part}.jsonl: {documents:,} documents, {size / 1e6:.2f} MB of text")
    if report.existed:
        say(f"{options.output}: {SAME}")
