"""Tokenize a corpus into Megatron's indexed format: PREFIX.bin, PREFIX.idx and a manifest PREFIX.json.

    megachiar preprocess --input 'corpus/*.jsonl.zst' --tokenizer tokenizer.model \\
        --output-prefix data/corpus --append-eod --split train=98,valid=1,test=1

Input may be jsonl, arrays of json, csv, txt (all also .gz, .zst, .xz, .bz2), parquet and Arrow: files, quoted globs,
folders (also those of the library `datasets`), or - for standard input. The output does not depend on --workers, nor
on interruptions. After a failure, run the same command again: it goes on with the first file that is missing. After a
success it does nothing. Exit code 2 means a problem that you can mend; no dataset was written then.

Labels make a dataset for classification, a document for each example:

    megachiar preprocess --input imdb/train.jsonl --label-key label --tokenizer bytes.json \\
        --output-prefix data/imdb_train
    megachiar preprocess --input imdb/test.jsonl --label-key label --classes-from data/imdb_train \\
        --tokenizer bytes.json --output-prefix data/imdb_test
    megachiar preprocess --input aan/train.jsonl --label-key label --text-key text1 --second-text-key text2 \\
        --max-text-tokens 4000 --tokenizer bytes.json --output-prefix data/aan_train
    megachiar preprocess --input listops/train.jsonl --label-key label --token-key tokens --vocab-size 17 \\
        --output-prefix data/listops_train

On many machines, run `mpirun -n 16 megachiar preprocess --mpi ...`, or `--shard K/N` in each of N jobs and then
`--merge-shards N`. The files are those that one process writes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from megachiar.data.inputs.input_options import add_input_options, named_inputs, read_options
from megachiar.data.tokenizers.choices import Engine, TokenizerKind
from megachiar.options import CommandParser, number
from megachiar.process_memory import keep_large_blocks_apart

if TYPE_CHECKING:
    from megachiar.data.preprocessing.report import Report
    from megachiar.data.preprocessing.settings import PreprocessSettings


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("preprocess", __doc__)
    add_input_options(parser)
    add = parser.add_argument
    add(
        "--tokenizer",
        type=Path,
        help="*.model, tokenizer.json, a folder with a tokenizer's files, or hf:NAME or hf:NAME@REVISION on the "
        "Hugging Face hub, which is fetched into its cache",
    )
    add(
        "--tokenizer-kind",
        choices=get_args(TokenizerKind),
        default="auto",
        help="library of the tokenizer (default: by its files)",
    )
    add("--eod-token", help="token that ends a document (default: eos_token of tokenizer_config.json, or the own one)")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--bos-token", help="token of --prepend-bos (default: bos_token of tokenizer_config.json, or the own one)")
    add("--prepend-bos", action="store_true", help="begin each document with the beginning-of-document token")
    add(
        "--allow-control-tokens",
        action="store_true",
        help="a control string in a text, such as <|im_start|>, becomes the token (default: it stays text)",
    )
    add("--output-prefix", type=Path, required=True, help="path of the dataset without suffix")
    add("--split", help="parts by hash of the document, such as train=98,valid=1,test=1")
    add(
        "--shuffle-seed",
        type=int,
        metavar="S",
        help="shuffle the documents by this key (needs the output's size twice)",
    )
    add(
        "--engine",
        choices=get_args(Engine),
        default="auto",
        help="fast: gigatoken, after it was proved equal on a sample; reference: the tokenizer's own library; auto: "
        "fast where it is installed and equal (default: %(default)s)",
    )
    add(
        "--workers",
        type=number(int, least=1),
        default=usable_cores(),
        help="tokenizing processes (default: one per usable core)",
    )
    add("--overwrite", action="store_true", help="replace an existing dataset")
    add("--restart", action="store_true", help="drop the files of an unfinished run instead of continuing it")
    add_example_options(parser)
    shared = parser.add_mutually_exclusive_group()
    shared.add_argument("--mpi", action="store_true", help="share the inputs between the ranks of mpirun")
    shared.add_argument("--shard", type=shard_of, metavar="K/N", help="make shard K (0 to N - 1) of N of the inputs")
    shared.add_argument(
        "--merge-shards", type=number(int, least=1), metavar="N", help="join N shards that were made, and remove them"
    )
    arguments = parser.parse_args(argv)
    if arguments.tokenizer is None and arguments.token_key is None:
        parser.error("the following arguments are required: --tokenizer")
    return arguments


def add_example_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of labelled documents, of two texts each and of ready-made ids."""
    add = parser.add_argument_group("documents of jsonl or parquet that hold more than one text").add_argument
    add("--label-key", metavar="KEY", help="key of the label, text or a whole number: the dataset has a class for each")
    named = parser.add_mutually_exclusive_group()
    named.add_argument(
        "--classes", type=names_of, metavar="A,B", help="the classes in order (default: those found, sorted)"
    )
    named.add_argument("--classes-from", type=Path, metavar="PREFIX", help="take the classes of this labelled dataset")
    add("--second-text-key", metavar="KEY", help="key of a second text; the end-of-document token stands between both")
    add("--token-key", metavar="KEY", help="key of ready-made ids, in place of text and --tokenizer")
    add("--vocab-size", type=number(int, least=1), metavar="N", help="of --token-key: the largest possible id, plus 1")
    add("--max-text-tokens", type=number(int, least=1), metavar="N", help="keep the first N tokens of each text (all)")


def names_of(text: str) -> tuple[str, ...]:
    """Return the names of ``"a, b,c"``."""
    return tuple(name.strip() for name in text.split(","))


def shard_of(text: str) -> tuple[int, int]:
    """Return (K, N) for ``"K/N"``."""
    number, _, shards = text.partition("/")
    if not (number.isdecimal() and shards.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form K/N, such as 0/64")
    return int(number), int(shards)


def main(argv: Sequence[str] | None = None) -> None:
    keep_large_blocks_apart()
    arguments = parse_arguments(argv)

    from megachiar.data.preprocessing.example_checks import classes_of
    from megachiar.data.preprocessing.settings import PreprocessSettings
    from megachiar.data.preprocessing.split import Split
    from megachiar.data.tokenizers.hub import local_tokenizer

    inputs = named_inputs(arguments)
    classes = arguments.classes if arguments.classes_from is None else tuple(classes_of(arguments.classes_from))
    read = replace(
        read_options(arguments),
        second_text_key=arguments.second_text_key,
        token_key=arguments.token_key,
        label_key=arguments.label_key,
    )
    settings = PreprocessSettings(
        sources=inputs.sources,
        found=inputs.found,
        tokenizer=None if arguments.tokenizer is None else local_tokenizer(arguments.tokenizer),
        tokenizer_kind=arguments.tokenizer_kind,
        eod_token=arguments.eod_token,
        prepend_bos=arguments.prepend_bos,
        allow_control_tokens=arguments.allow_control_tokens,
        bos_token=arguments.bos_token,
        output_prefix=arguments.output_prefix,
        read=read,
        append_eod=arguments.append_eod,
        split=Split.parse(arguments.split) if arguments.split is not None else None,
        on_error=arguments.on_error,
        workers=arguments.workers,
        fork=not arguments.mpi,  # this program has no threads, but MPI's libraries may have some
        engine=arguments.engine,
        shuffle_seed=arguments.shuffle_seed,
        overwrite=arguments.overwrite,
        restart=arguments.restart,
        vocab_size=arguments.vocab_size,
        classes=classes,
        max_text_tokens=arguments.max_text_tokens,
    )
    report = work(settings, arguments)
    if report is None and arguments.shard is not None:
        print("the shard, or the whole dataset, is there already: nothing was done", file=sys.stderr)
    for line in report.lines() if report is not None else ():
        print(line, file=sys.stderr)


def work(settings: PreprocessSettings, arguments: argparse.Namespace) -> Report | None:
    """Make the whole dataset, a shard, the merge of shards or an MPI rank's part, as the command line asks."""
    from megachiar.data.preprocessing.mpi import preprocess_with_mpi
    from megachiar.data.preprocessing.preprocess import preprocess
    from megachiar.data.preprocessing.shards import make_shard, merge_shards

    if arguments.mpi:
        return preprocess_with_mpi(settings)
    if arguments.shard is not None:
        return make_shard(settings, *arguments.shard)
    if arguments.merge_shards is not None:
        return merge_shards(settings, arguments.merge_shards)
    return preprocess(settings)
