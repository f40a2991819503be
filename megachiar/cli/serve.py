"""Serve a run by OpenAI's completions protocol, for any client of it.

megachiar serve runs/tiny                              # then use the base URL that it prints
megachiar serve runs/tiny --step 300 --port 8900 --max-running 16
megachiar serve runs/tiny --host 0.0.0.0               # for other machines too: there is no password

Ctrl-C ends it. It serves /v1/completions, /v1/models and /health.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megachiar.console import make_console, print_warning
from megachiar.options import (
    CommandParser,
    add_dtype_option,
    add_listen_options,
    add_run_argument,
    add_step_option,
    number,
)

PORT = 8000


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("serve", __doc__)
    add_run_argument(parser)
    add_step_option(parser)
    add_dtype_option(parser)
    add_listen_options(parser, PORT, "other names by which clients reach the server, such as that of a proxy")
    parser.add_argument("--model-name", metavar="NAME", help="name for clients (default: that of the run folder)")
    parser.add_argument(
        "--max-running", type=number(int, least=1), default=8, help="texts that are continued at a time (default 8)"
    )
    parser.add_argument(
        "--max-waiting", type=number(int, least=0), default=64, help="texts that may wait for a place (default 64)"
    )
    parser.add_argument(
        "--max-tokens", type=number(int, least=1), default=2048, help="most new tokens of a text (default 2048)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.inference.open_server import open_server
    from megachiar.local_server import serve_until_ctrl_c

    server = open_server(options, log=print_warning)
    console = make_console()

    def say_ready() -> None:
        if not server.is_local:
            print_warning("every machine that reaches this one can use the server: there is no password")
        console.print(f"{server.model.name}: {server.url}v1   (Ctrl-C ends it)", markup=False)

    serve_until_ctrl_c(server, say_ready, lambda line: make_console().print(line))
