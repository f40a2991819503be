"""Train a tokenizer on a corpus, which is named as for `megachiar preprocess`.

    megachiar tokenizer --input 'corpus/*.txt' --vocab-size 8000 --output tokenizer.model

It writes a SentencePiece model (*.model), or a Hugging Face byte-level BPE (*.json). Two kinds learn no pieces:

    megachiar tokenizer --kind bytes --output bytes.json
    megachiar tokenizer --kind words --input listops/train.jsonl --output words.json

`bytes` has a token for each byte and needs no corpus; `words` has one for each word between spaces. The same input and
options give the same file, and a command that was done before does nothing. Exit code 2 means a problem that you can
mend; nothing was written then.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from megachiar.console import make_console
from megachiar.data.inputs.input_options import add_input_options, named_inputs, read_options
from megachiar.data.preprocessing.choices import SUFFIXES, Algorithm, TrainedKind
from megachiar.options import CommandParser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("tokenizer", __doc__)
    add_input_options(parser, required=False)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="file to write, *.model or *.json")
    add("--vocab-size", type=int, help="tokens of the vocabulary, everything included; of words the most (all)")
    add("--kind", choices=tuple(SUFFIXES), help="default: by the suffix of --output")
    add("--algorithm", choices=get_args(Algorithm), default="bpe", help="unigram: SentencePiece only (default: bpe)")
    add("--max-text-mib", type=int, default=200, help="train on an even sample of at most this (default: 200)")
    add("--overwrite", action="store_true", help="replace an existing file")
    arguments = parser.parse_args(argv)
    needed = {"bytes": (), "words": ("input",)}.get(arguments.kind, ("input", "vocab_size"))
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(arguments, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)

    from megachiar.data.preprocessing.existing import SAME
    from megachiar.data.preprocessing.tokenizer_training import TrainingSettings, train_tokenizer

    by_suffix: TrainedKind = "huggingface" if arguments.output.suffix == SUFFIXES["huggingface"] else "sentencepiece"
    inputs = named_inputs(arguments)
    settings = TrainingSettings(
        sources=inputs.sources,
        found=inputs.found,
        output=arguments.output,
        vocab_size=arguments.vocab_size,
        kind=arguments.kind or by_suffix,
        algorithm=arguments.algorithm,
        read=read_options(arguments),
        max_text_bytes=arguments.max_text_mib << 20,
        on_error=arguments.on_error,
        overwrite=arguments.overwrite,
    )
    report = train_tokenizer(settings)
    console = make_console()
    for invalid in report.log.examples:
        console.print(f"skipped {invalid.where}: {invalid.problem} [{invalid.kind}]", markup=False)
    made_of = (
        f", trained on {report.used_documents:,} documents ({report.used_bytes:,} bytes) of {report.read_documents:,} "
        f"({report.read_bytes:,} bytes)"
    )
    console.print(
        f"{settings.output}: {report.tokenizer.vocab_size:,} tokens, end of document {report.tokenizer.eod_id}"
        f"{made_of if settings.kind != 'bytes' else ''}",
        markup=False,
    )
    if report.existed:
        console.print(f"{settings.output}: {SAME}", markup=False)
