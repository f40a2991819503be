"""Tokenize a corpus into Megatron's indexed format: PREFIX.bin, PREFIX.idx and a manifest PREFIX.json.

    python tools/preprocess_data.py --input 'corpus/*.jsonl.zst' --tokenizer tokenizer.model \\
        --output-prefix data/corpus --append-eod --split train=98,valid=1,test=1

Input may be jsonl, jsonl.gz, jsonl.zst, txt (.gz, .zst) and parquet: files, quoted globs, folders, or - for standard
input. The output does not depend on --workers. Exit code 2: a problem you can mend, and nothing was written.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

from megachiar.console import make_console, run
from megachiar.data.input_options import add_input_options, named_sources, read_options
from megachiar.data.preprocess import PreprocessSettings, Split, preprocess
from megachiar.data.tokenizer import TokenizerKind


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_options(parser)
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True, help="*.model, tokenizer.json, or a folder with a tokenizer's files")
    add("--tokenizer-kind", choices=get_args(TokenizerKind), default="auto")
    add("--eod-token", help="token that ends a document (default: the tokenizer's own)")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--output-prefix", type=Path, required=True, help="path of the dataset without suffix")
    add("--split", help="parts by hash of the document, such as train=98,valid=1,test=1")
    add("--workers", type=int, default=usable_cores(), help="tokenizing processes (default: one per usable core)")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    settings = PreprocessSettings(
        sources=named_sources(arguments),
        tokenizer=arguments.tokenizer,
        tokenizer_kind=arguments.tokenizer_kind,
        eod_token=arguments.eod_token,
        output_prefix=arguments.output_prefix,
        read=read_options(arguments),
        append_eod=arguments.append_eod,
        split=Split.parse(arguments.split) if arguments.split is not None else None,
        on_error=arguments.on_error,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    console = make_console()
    for line in preprocess(settings).lines():
        console.print(line, markup=False)


if __name__ == "__main__":
    run(main)
