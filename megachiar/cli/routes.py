"""Show which operator each token of a text takes in each layer, and by which spectral entropy H.

megachiar routes runs/tiny --text "To be, or not to be, that is the question."
megachiar routes runs/tiny --file scene.txt --html routes.html     # one page for a browser, without a network
megachiar routes runs/tiny --file scene.txt --layer 2 3 --step 300
echo "To be, or not to be" | megachiar routes runs/tiny --text - --json

On a terminal tokens have the colour of their operator, elsewhere marks. docs/routes.md describes page and JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megachiar.console import make_console, print_warning
from megachiar.errors import UserError, disk_errors
from megachiar.options import (
    CommandParser,
    OptionError,
    add_dtype_option,
    add_json_option,
    add_run_argument,
    add_step_option,
    number,
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("routes", __doc__)
    add_run_argument(parser)
    parser.add_argument("--text", help="text to route; - reads it from standard input")
    parser.add_argument("--file", type=Path, metavar="FILE", help="file in UTF-8 whose text is routed")
    add_step_option(parser)
    add_dtype_option(parser)
    parser.add_argument(
        "--layer",
        type=number(int, least=1),
        nargs="+",
        metavar="N",
        help="layers whose routes are printed, from 1 (default: the first that routes)",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with all layers, for a browser")
    add_json_option(parser)
    options = parser.parse_args(argv)
    if (options.text is None) == (options.file is None):
        problem = "is missing" if options.text is None else "does not go with --file"
        raise OptionError("--text", problem, f"give --text TEXT or --file FILE{parser.example('--text')}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)
    text, where = read_text(options)

    from megachiar.model.dtypes import DTYPES
    from megachiar.viewer.open_run import open_run
    from megachiar.viewer.page import check_page, write_page
    from megachiar.viewer.terminal import print_routes

    if options.html is not None:
        check_page(options.html)  # before the work
    run = open_run(options.run, options.step, DTYPES.get(options.dtype), log=print_warning)
    layers = chosen_layers(options.layer, list(run.config.model.routed_layers), run.config.model.num_layers)
    record = run.record(run.routes(run.encode(text, where)))
    if options.html is not None:
        write_page(options.html, record)
        make_console().print(f"wrote {options.html}: {len(record['tokens']):,} tokens", markup=False)
    if options.json:
        print(json.dumps(record))
    elif options.html is None:
        print_routes(make_console(sys.stdout), record, layers)


def read_text(options: argparse.Namespace) -> tuple[str, str]:
    """Return the text, and what a message calls the place that it comes from.

    Raises:
        UserError: the file cannot be read, or is not in UTF-8.
    """
    if options.file is None:
        return (sys.stdin.read().removesuffix("\n") if options.text == "-" else options.text), "--text"
    with disk_errors(options.file, "read"):
        content = options.file.read_bytes()
    try:
        return content.decode(), str(options.file)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{options.file}: byte {error.start}", "is no UTF-8", "convert the file, for example with iconv -t utf-8"
        ) from None


def chosen_layers(wanted: Sequence[int] | None, routed: Sequence[int], layers: int) -> Sequence[int]:
    """Return the numbers, from 1, of the layers to print.

    Args:
        wanted: as the user gave them; None for the first layer that routes, or the first one where none does.
        routed: indices, from 0, of the layers that route.
        layers: how many the model has.

    Raises:
        UserError: there is no such layer.
    """
    for layer in wanted or ():
        if layer > layers:
            raise UserError(f"--layer {layer}", f"the model has {layers} layers", f"give 1 to {layers}")
    return wanted or [next(iter(routed), 0) + 1]
