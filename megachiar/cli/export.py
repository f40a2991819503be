"""Write a run's weights in the form that other code loads: the library transformers, or the published CHIAR-Former.

megachiar export runs/tiny --to hf --output exports/tiny --license mit
megachiar export runs/published --to published chiar_best.pt
megachiar export runs/17m/checkpoints/step_00036000 --to published chiar_best.pt --vocab-size 50257

The exported model has the run's logits, which `--to hf` checks before it leaves a folder. A run that the form cannot
express is refused. Optimizer state is not exported.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megachiar.console import print_warning
from megachiar.errors import UserError
from megachiar.options import CommandParser, add_json_option, add_run_argument, number


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("export", __doc__)
    add_run_argument(parser)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="published: checkpoint to write (*.pt)")
    parser.add_argument("--to", choices=("hf", "published"), required=True, help="hf: for transformers; or published")
    parser.add_argument("--output", type=Path, metavar="DIR", help="hf: the folder to make")
    parser.add_argument("--task", metavar="NAME", help="hf: the task of a mixed run (default: the main one)")
    parser.add_argument("--license", metavar="NAME", help="hf: license of the card, such as mit (default: unknown)")
    parser.add_argument("--no-tokenizer", action="store_true", help="hf: write no tokenizer files")
    parser.add_argument("--overwrite", action="store_true", help="hf: replace another export in DIR")
    parser.add_argument(
        "--shard-size",
        type=number(float, above=0),
        metavar="GIB",
        help="hf: largest file of weights (default 4)",
    )
    parser.add_argument(
        "--vocab-size",
        type=number(int, least=1),
        help="published: leave out the rows of the embedding after so many (default: none)",
    )
    add_json_option(parser)
    options = parser.parse_intermixed_args(argv)  # FILE may stand after --to, apart from RUN
    check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Check that the options are those of the form that is asked for.

    Raises:
        UserError: one is of the other form, or the output is missing.
    """
    of_hf = {"--output": options.output, "--task": options.task, "--license": options.license}
    of_hf |= {"--no-tokenizer": options.no_tokenizer or None, "--shard-size": options.shard_size}
    of_hf |= {"--overwrite": options.overwrite or None}
    of_published = {"FILE": options.file, "--vocab-size": options.vocab_size}
    wrong, needed = (of_published, "--output") if options.to == "hf" else (of_hf, "FILE")
    for name, value in wrong.items():
        if value is not None:
            raise UserError(f"--to {options.to}", f"{name} is an option of the other form", "leave it out")
    if (of_hf | of_published)[needed] is None:
        raise UserError(f"--to {options.to}", f"needs {needed}, where it writes to", f"give {needed}")


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.checkpoint.reading import locate_checkpoint

    if options.to == "hf":
        export_to_hf(options)
        return
    from megachiar.data.preprocessing.existing import SAME
    from megachiar.interop.published_export import export_published

    checkpoint = locate_checkpoint(options.run, log=print_warning)
    report, written = export_published(checkpoint, options.file, options.vocab_size)
    if options.json:
        print(json.dumps({"checkpoint": str(checkpoint), "written": written, **report.__dict__}))
        return
    print(f"cfg: {', '.join(f'{name} {value}' for name, value in report.cfg.items())}")
    for note in report.notes:
        print(f"note: {note}")
    print("optimizer state: not exported")
    print(f"wrote {options.file}, step {report.step:,}" if written else f"{options.file} {SAME}")


def export_to_hf(options: argparse.Namespace) -> None:
    """Export a run for transformers, and print what was done."""
    from megachiar.checkpoint.reading import locate_checkpoint
    from megachiar.data.preprocessing.existing import SAME
    from megachiar.interop.huggingface_card import DEFAULT_LICENSE
    from megachiar.interop.huggingface_export import HuggingFaceOptions, export_huggingface
    from megachiar.interop.huggingface_weights import SHARD_BYTES

    checkpoint = locate_checkpoint(options.run, log=print_warning)
    asked = HuggingFaceOptions(
        task=options.task,
        license_name=options.license or DEFAULT_LICENSE,
        shard_bytes=int(options.shard_size * 2**30) if options.shard_size else SHARD_BYTES,
        with_tokenizer=not options.no_tokenizer,
        replace=options.overwrite,
    )
    report = export_huggingface(checkpoint, options.output, asked)
    if options.json:
        found = report.__dict__ if report is not None else {}
        print(json.dumps({"checkpoint": str(checkpoint), "written": report is not None, **found}))
        return
    if report is None:
        print(f"{options.output} {SAME}")
        return
    for note in report.notes:
        print(f"note: {note}")
    print(f"checked: logits differ by at most {report.largest_difference:.1e} in fp64, greedy tokens are the same")
    print("optimizer state: not exported")
    print(f"wrote {options.output}, step {report.step:,}, {report.parameters:,} parameters")
