"""Write a run's weights as a checkpoint of the published CHIAR-Former code, which its scripts load.

megachiar export runs/published --to published chiar_best.pt
megachiar export runs/17m/checkpoints/step_00036000 --to published chiar_best.pt --vocab-size 50257

The published model has the run's logits. A run that it cannot express is refused. Optimizer state is not exported.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megachiar.console import print_warning
from megachiar.options import CommandParser, add_json_option, add_run_argument, number


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("export", __doc__)
    add_run_argument(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="checkpoint to write (*.pt)")
    parser.add_argument("--to", choices=("published",), required=True, help="whose checkpoint it is")
    parser.add_argument(
        "--vocab-size",
        type=number(int, least=1),
        help="leave out the rows of the embedding after so many (default: none)",
    )
    add_json_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.checkpoint.reading import locate_checkpoint
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
