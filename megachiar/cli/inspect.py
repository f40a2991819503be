"""Show the content of an indexed dataset, check it, and print the text of a document or training sample.

    megachiar inspect data/train
    megachiar inspect data/train --verify
    megachiar inspect data/train --document 7
    megachiar inspect data/imdb_train --sequence-length 512
    megachiar inspect data/train --sample 0 --sequence-length 1024 --seed 1
    megachiar inspect --config configs/tiny.yaml --step 100

Of a labelled dataset the first command shows the classes and how long examples are, and --document the label too. With
--sequence-length alone it counts the documents that are longer. The last command prints the documents and the text that
a step of a run reads, whatever its layout.

The exit code is 0 if every check passes. It is 2 if one fails, and the message names it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megachiar.options import CommandParser, OptionError, add_config_options, add_json_option, number
from megachiar.progress import ByteProgress


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("inspect", __doc__)
    parser.add_argument("prefix", type=Path, nargs="?", metavar="PREFIX", help="the dataset, without .bin")
    add_config_options(parser, required=False)
    parser.add_argument("--verify", action="store_true", help="read the files whole and compare them with the manifest")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--document", type=number(int, least=0), metavar="N", help="show document N")
    shown.add_argument(
        "--sample", type=number(int, least=0), metavar="N", help="show sample N of a run on this dataset alone"
    )
    shown.add_argument("--step", type=int, metavar="N", help="show what step N (from 1) of a run reads; with --config")
    parser.add_argument(
        "--sequence-length",
        type=number(int, least=1),
        metavar="T",
        help="of --sample, tokens; alone: count the documents that have more",
    )
    parser.add_argument("--seed", type=number(int, least=0), metavar="S", help="of --sample: training.seed of the run")
    parser.add_argument("--tokenizer", type=Path, help="to decode with; else the one the manifest names")
    add_json_option(parser)
    arguments = parser.parse_args(argv)
    check_together(arguments, parser)
    return arguments


def check_together(arguments: argparse.Namespace, parser: CommandParser) -> None:
    """Check that the arguments make sense together.

    Raises:
        OptionError: one is given without another that it belongs to.
    """
    of_sample = arguments.sequence_length, arguments.seed
    run, sample = parser.example("--step"), parser.example("--sample")
    rules = (
        (arguments.overrides and arguments.config is None, "--set", "belongs to --config", run),
        (arguments.config is None and arguments.step is not None, "--step", "needs --config", run),
        (arguments.config is not None and arguments.step is None, "--config", "needs --step", run),
        (arguments.prefix is None and arguments.config is None, parser.prog, "PREFIX is missing", parser.example()),
        (arguments.prefix is not None and arguments.config is not None, "PREFIX", "does not go with --config", run),
        (arguments.sample is not None and None in of_sample, "--sample", "needs --sequence-length and --seed", sample),
        (arguments.sample is None and arguments.seed is not None, "--seed", "belongs to --sample", sample),
        (
            arguments.sequence_length is not None and arguments.prefix is None,
            "--sequence-length",
            "belongs to PREFIX",
            sample,
        ),
    )
    for broken, where, problem, example in rules:
        if broken:
            raise OptionError(where, problem, f"give what belongs together{example}")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.step is not None:
        print_step(arguments)
        return
    summary = summary_of(arguments.prefix, arguments.verify)
    shown = look_inside(arguments)
    if arguments.sample is None and arguments.sequence_length is not None:
        from megachiar.data.sampling.inspection import longer_documents

        summary["longer"] = longer_documents(arguments.prefix, arguments.sequence_length)
    if arguments.json:
        print(json.dumps({**summary, "shown": shown}, ensure_ascii=False))
    elif shown is None:
        print_summary(summary)
    else:
        print_text(shown)


def summary_of(prefix: Path, verify: bool) -> dict[str, Any]:
    from megachiar.data.sampling.inspection import summarise
    from megachiar.data.storage.files import bin_path, idx_path, labels_path
    from megachiar.data.storage.reader import IndexedDataset

    if not verify:
        return summarise(prefix)
    IndexedDataset(prefix)  # reports a missing file before its size is read
    paths = (bin_path(prefix), idx_path(prefix), labels_path(prefix))
    total = sum(path.stat().st_size for path in paths if path.exists())
    with ByteProgress("verifying", total) as progress:
        return summarise(prefix, verify=True, on_bytes=progress.advance)


def look_inside(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Return the document or sample that the command line asks for; None if it asks for none."""
    if arguments.document is None and arguments.sample is None:
        return None

    from megachiar.data.sampling.inspection import find_tokenizer, show_document, show_sample

    tokenizer = find_tokenizer(arguments.prefix, arguments.tokenizer)
    if arguments.document is not None:
        return show_document(arguments.prefix, arguments.document, tokenizer)
    return show_sample(arguments.prefix, arguments.sample, arguments.sequence_length, arguments.seed, tokenizer)


def print_step(arguments: argparse.Namespace) -> None:
    """Print the samples that one step of a run reads or has read."""
    from megachiar.config import load_config
    from megachiar.data.sampling.inspection import show_samples
    from megachiar.training.run_data import open_at_step

    tokenizer = [f"data.tokenizer={json.dumps(str(arguments.tokenizer))}"] if arguments.tokenizer is not None else []
    config = load_config(arguments.config, [*arguments.overrides, *tokenizer])
    data, stream, positions = open_at_step(config, arguments.step)
    samples = show_samples(stream, positions, data.tokenizer)
    if arguments.json:
        print(json.dumps({"step": arguments.step, "samples": samples}, ensure_ascii=False))
        return
    for shown in samples:
        print_text(shown)


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the content of a dataset, its manifest, and the checks that could not be made."""
    for path, size in summary["files"].items():
        print(f"{path}: {size:,} bytes")
    sizes = summary["document_tokens"]
    print(f"documents       {summary['documents']:,} in {summary['sequences']:,} sequences")
    print(f"tokens          {summary['tokens']:,} of {summary['dtype']}")
    print(
        f"document size   {sizes['smallest']:,} to {sizes['largest']:,} tokens, "
        f"mean {sizes['mean']:,.1f}, median {sizes['median']:,.1f}"
    )
    if "classes" in summary:
        print_labels(summary)
    if (longer := summary.get("longer")) is not None:
        print(
            f"longer          {longer['documents']:,} documents ({longer['share_of_documents']:.1%}) than "
            f"{longer['sequence_length']:,} tokens, by {longer['tokens_beyond']:,} tokens "
            f"({longer['share_of_tokens']:.1%})"
        )
    if "largest_token_id" in summary:
        print(f"ids             {summary['smallest_token_id']:,} to {summary['largest_token_id']:,}")
    manifest = summary["manifest"]
    if manifest is not None:
        tokenizer = manifest["tokenizer"]
        print_tokenizer(manifest, tokenizer)
        print(f"end of document {tokenizer['eod_id'] if manifest['append_eod'] else 'not appended'}")
        if "bos_id" in tokenizer:
            print(f"begins with     {tokenizer['bos_id']}")
        print(f"skipped         {manifest['skipped'] or 'nothing'}")
        print(f"made by         {manifest['created_by']} from {len(manifest['sources']):,} files")
    print(f"in order        {', '.join(summary['verified'])}")
    for what in summary["not_checked"]:
        print(f"not checked     {what}")


def print_labels(summary: Mapping[str, Any]) -> None:
    """Print how many documents each class has, and how long documents are."""
    for place, (name, count) in enumerate(summary["classes"].items()):
        title = "classes" if place == 0 else ""
        print(f"{title:15} {place} {name}: {count:,} documents ({count / summary['documents']:.1%})")
    quantiles = ", ".join(f"{share} {length:,}" for share, length in summary["document_quantiles"].items())
    print(f"at most         {quantiles} tokens")


def print_tokenizer(manifest: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> None:
    """Print what made the tokens."""
    if tokenizer["kind"] == "ids":
        print(f"tokenizer       none: ready-made ids below {tokenizer['vocab_size']:,}")
        return
    print(f"text            {manifest['text_bytes']:,} bytes, {manifest['words']:,} words")
    print(f"tokenizer       {tokenizer['kind']} {tokenizer['file']}, {tokenizer['vocab_size']:,} ids")
    print(f"                {tokenizer['fingerprint']}")
    if "hub" in tokenizer:
        print(f"                {tokenizer['hub']}")


def print_text(shown: Mapping[str, Any]) -> None:
    """Print the facts about a document or sample and its text, or its ids if there is no tokenizer."""
    for key, value in shown.items():
        if key not in ("ids", "text"):
            print(f"{key.replace('_', ' ')}: {value if isinstance(value, str) else f'{value:,}'}")
    if shown["text"] is None:
        print("no tokenizer was found (give one with --tokenizer); ids:")
        print(*shown["ids"])
    else:
        print(shown["text"])
