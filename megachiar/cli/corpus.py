"""Fetch a corpus to start with: train.jsonl, valid.jsonl and test.jsonl, whole works held out.

megachiar corpus --output data/shakespeare                            # Shakespeare and Milton, 6.5 MB
megachiar corpus --source wikitext-103 --output data/wikitext-103     # needs the extra hf and a network

Each line is {"text", "work", "edition"}. Without a network the first one takes 0.4 MB of English text that every Python
carries, and says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megachiar.console import make_console
from megachiar.data.corpus import WIKITEXT, shakespeare_and_milton, wikitext, write_corpus
from megachiar.options import CommandParser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("corpus", __doc__)
    parser.add_argument("--source", choices=("shakespeare", *WIKITEXT), default="shakespeare")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where the files are written")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options, console = parse_arguments(argv), make_console()

    def say(line: str) -> None:
        console.print(line, markup=False)

    works = shakespeare_and_milton(say) if options.source == "shakespeare" else wikitext(options.source)
    for part, (documents, size) in write_corpus(works, options.output).items():
        say(f"{options.output / part}.jsonl: {documents:,} documents, {size / 1e6:.2f} MB of text")
