"""Show the routes of any text live in a browser: type, look, and let the run continue the text.

megachiar demo runs/tiny                           # then open the URL that it prints
megachiar demo runs/tiny --step 300 --port 8900
megachiar demo runs/tiny --host 0.0.0.0            # for other machines too: there is no password

Ctrl-C ends it. From a cluster, forward the port: ssh -L 8765:127.0.0.1:8765 HOST.
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

PORT = 8765


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("demo", __doc__)
    add_run_argument(parser)
    add_step_option(parser)
    add_dtype_option(parser)
    add_listen_options(parser, PORT, "other names by which browsers reach the demo, such as that of a proxy")
    parser.add_argument(
        "--max-tokens", type=number(int, least=1), default=5000, help="longest text in tokens (default 5000)"
    )
    parser.add_argument(
        "--max-new-tokens", type=number(int, least=1), default=2000, help="longest continuation (default 2000)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.local_server import serve_until_ctrl_c
    from megachiar.model.dtypes import DTYPES
    from megachiar.viewer.demo_requests import DemoLimits
    from megachiar.viewer.demo_server import DemoServer
    from megachiar.viewer.open_run import open_run

    run = open_run(options.run, options.step, DTYPES.get(options.dtype), log=print_warning)
    limits = DemoLimits(options.max_tokens, options.max_new_tokens)
    server = DemoServer(run, options.host, options.port, limits, options.allow_host)
    console = make_console()

    def say_ready() -> None:
        if not server.is_local:
            print_warning("every machine that reaches this one can use the demo: there is no password")
        console.print(f"{options.run} at step {run.state.step:,}: {server.url}   (Ctrl-C ends it)", markup=False)
        if options.open:
            open_browser(server.url)

    # Another console says the end, since an interrupted one would print its line again.
    serve_until_ctrl_c(server, say_ready, lambda line: make_console().print(line))


def open_browser(url: str) -> None:
    """Open ``url`` in this machine's browser, if it has one."""
    import webbrowser

    if not webbrowser.open(url):
        print_warning("this machine has no browser that could be opened")
