"""Join indexed datasets of one tokenizer into one.

    megachiar merge data/part0 data/part1 --output data/whole

Inputs and output are prefixes (PREFIX.bin, PREFIX.idx, PREFIX.json). Types, tokenizers and checksums are compared. The
output is complete or does not exist. A command that was done before does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from megachiar.options import CommandParser
from megachiar.progress import ByteProgress


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("merge", __doc__)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="PREFIX", help="datasets to join, in this order")
    parser.add_argument("--output", required=True, type=Path, metavar="PREFIX", help="dataset to write")
    parser.add_argument("--shuffle-seed", type=int, metavar="S", help="shuffle the documents by this key")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    parser.add_argument(
        "--allow-missing-manifest",
        action="store_true",
        help="merge datasets without manifest (made by another program); you vouch that they are of one tokenizer",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)

    from megachiar.data.preprocessing.existing import SAME, OutputDiffers
    from megachiar.data.preprocessing.merge import find_merged, merge_datasets
    from megachiar.data.storage.files import bin_path
    from megachiar.data.storage.reader import IndexedDataset

    if not arguments.overwrite:
        with contextlib.suppress(OutputDiffers):
            find_merged(arguments.inputs, arguments.output, arguments.shuffle_seed)
            print(f"{arguments.output}: {SAME}")
            return
    total = sum(IndexedDataset(prefix).tokens.nbytes for prefix in arguments.inputs)
    with ByteProgress("merging", total) as progress:
        merge_datasets(
            arguments.inputs,
            arguments.output,
            overwrite=arguments.overwrite,
            allow_missing_manifest=arguments.allow_missing_manifest,
            shuffle_seed=arguments.shuffle_seed,
            on_bytes=progress.advance,
        )
    merged = IndexedDataset(arguments.output)
    print(f"{bin_path(arguments.output)}: {merged.documents:,} documents, {merged.tokens.size:,} tokens")
