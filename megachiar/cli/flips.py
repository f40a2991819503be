"""Count the tokens that a trained model routes differently in bf16 (or fp16) than in fp32.

megachiar flips runs/tiny --data data/shakespeare/valid
megachiar flips runs/tiny --precision fp16 --json

For "rounded" only the hidden states that a router reads are rounded. For "whole model" everything computes in 16 bits,
so that differences of earlier layers count too. Entropy is computed in fp32 in both cases.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megachiar.console import print_warning
from megachiar.errors import UserError
from megachiar.options import PRECISIONS, CommandParser, add_json_option, add_run_argument, number

if TYPE_CHECKING:
    from megachiar.analysis.flips import LayerFlips


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("flips", __doc__)
    add_run_argument(parser)
    parser.add_argument("--data", type=Path, metavar="PREFIX", help="dataset (default: the run's first source)")
    parser.add_argument(
        "--precision",
        choices=sorted({*PRECISIONS} - {"fp32"}),
        default="bf16",
        help="to compare with fp32 (%(default)s)",
    )
    parser.add_argument(
        "--sequences", type=number(int, least=1), default=64, help="windows that are read (%(default)s)"
    )
    add_json_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.analysis.flips import routing_flips
    from megachiar.analysis.windows import spread_windows
    from megachiar.checkpoint.reading import locate_checkpoint
    from megachiar.inference.loaded_run import default_device, open_for_run
    from megachiar.inference.loading import load_model
    from megachiar.model.dtypes import DTYPES

    checkpoint = locate_checkpoint(options.run, log=print_warning)
    config, model, state = load_model(checkpoint, default_device(), DTYPES["fp32"])
    if not config.model.routed_layers:
        raise UserError(options.run, "has no layer that routes", "name a run of a CHIAR model of 3 layers or more")
    data = options.data or config.data.train[0].path
    dataset = open_for_run(checkpoint, config, data)
    windows = spread_windows(dataset, options.sequences)
    found = routing_flips(model, DTYPES[options.precision], windows, config.training.micro_batch_size)
    if options.json:
        layers = [layer.as_dict() for layer in found]
        record = {"run": str(options.run), "step": state.step, "data": str(data), "precision": options.precision}
        print(json.dumps({**record, "layers": layers}))
    else:
        print_table(found, f"routes in {options.precision} against fp32, {options.run} at step {state.step:,}, {data}")


def print_table(found: list[LayerFlips], title: str) -> None:
    """Print for each routed layer the share of tokens that takes another route when numbers are rounded."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in ("layer", "tokens", "flips: rounded", "whole model", "mean change of H", "median |H - tau|"):
        table.add_column(name, justify="right")
    for layer in found:
        margin = "" if layer.margin is None else f"{layer.margin:.1e}"
        shares = f"{layer.rounded:.2%}", f"{layer.whole:.2%}"
        table.add_row(str(layer.layer), f"{layer.tokens:,}", *shares, f"{layer.entropy_change:.1e}", margin)
    Console(width=140, highlight=False).print(table)
