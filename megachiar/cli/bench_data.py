"""Time the data tools and Megatron-LM's in turn, start-up included, and report their memory.

    megachiar bench-data preprocess --megabytes 40 --peer ~/Megatron-LM
    megachiar bench-data files --files 20000
    megachiar bench-data open
    megachiar bench-data read --peer ~/Megatron-LM

`preprocess` tokenizes a corpus made of the text files of this Python's own installation with a byte-level BPE trained
on them. It runs our tool with each engine, and the peer's `preprocess_data.py` and `preprocess_data_fast.py`: once to
measure memory, then in turn, round by round. It also compares the files. `files` tokenizes the same text from one file
and from a folder of many tiny ones, with each engine, and prints the ratio of the times. `open` measures the time and
the memory until the first sample of a dataset of 10 million documents and 5 billion tokens. `read` counts samples a
second in training order, beside the peer's GPTDataset.

--peer is a checkout of Megatron-LM; --peer-python a Python that can run it (default: this one).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megachiar.options import CommandParser, number


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)

    from megachiar.analysis.data_times import time_data_tools

    time_data_tools(options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("bench-data", __doc__)
    parser.add_argument("what", choices=("preprocess", "files", "open", "read"), help="what to time, see above")
    parser.add_argument("--files", type=number(int, least=1), default=20_000, help="for files: how many tiny ones")
    parser.add_argument(
        "--megabytes", type=number(int, least=1), default=40, help="of text; for read: thousands of documents"
    )
    parser.add_argument("--workers", type=number(int, least=1), default=2, help="tokenizing processes (%(default)s)")
    parser.add_argument("--rounds", type=number(int, least=1), default=3, help="times each is measured (%(default)s)")
    parser.add_argument(
        "--engines",
        nargs="+",
        default=["fast", "reference"],
        choices=("fast", "reference"),
        help="of ours, that are timed (all)",
    )
    parser.add_argument("--peer", type=Path, metavar="FOLDER", help="a checkout of Megatron-LM")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PYTHON", help="that runs it (default: this one)"
    )
    parser.add_argument(
        "--peer-tools",
        nargs="+",
        default=["peer", "peer fast"],
        choices=("peer", "peer fast"),
        help="of it, that are timed (all)",
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args(argv)
