"""Write the page of a run: curves, config and what changed, environment, events, samples, and routes of a text.

megachiar page runs/tiny                            # writes runs/tiny/index.html
megachiar page runs/tiny --output tiny.html --no-routes

A run writes this page itself at each evaluation, unless logging.page is false. The command writes it again afterwards,
also for runs of earlier versions, and with routes where the model was shared out among ranks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megachiar.console import make_console
from megachiar.errors import UserError
from megachiar.options import CommandParser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("page", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder (logging.folder of its config)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file of the page (default: RUN/index.html)")
    parser.add_argument("--no-routes", action="store_true", help="load no checkpoint: no routes of a text")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.launch import quiet_deepspeed

    quiet_deepspeed()

    from megachiar.monitoring.watched_run import check_is_run

    if not options.run.is_dir():
        raise UserError(options.run, "there is no such folder", "give a run folder (logging.folder of its config)")
    check_is_run(options.run)

    from megachiar.monitoring.run_page import GENERATOR, KIND, PAGE_FILE, write_run_page
    from megachiar.monitoring.run_routes import routes_of_checkpoint
    from megachiar.monitoring.watched_run import WatchedRun
    from megachiar.viewer.page import check_page

    path = options.run / PAGE_FILE if options.output is None else options.output
    check_page(path, GENERATOR, KIND)
    run = WatchedRun(options.run, options.run.resolve().name)
    while run.read():
        pass
    routes = {"note": "not asked for"}
    if not options.no_routes:
        try:
            routes = routes_of_checkpoint(options.run)
        except UserError as error:
            routes = {"note": f"{error.where}: {error.problem}"}
    write_run_page(run, routes, path)
    made = make_console()
    if routes["note"] is not None:
        made.print(f"without routes of a text: {routes['note']}", style="yellow", markup=False)
    made.print(f"wrote {path}", markup=False)
