"""Watch runs in the terminal while they train: curves, validation, throughput, shares and H by layer, events.

megachiar monitor runs/tiny
megachiar monitor runs/400m runs/400m_baseline      # side by side
megachiar monitor runs/tiny --once                  # one frame, as for a log

It reads the run folders and nothing else, from any machine that sees them. q and Ctrl-C end the view, not the runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megachiar.options import CommandParser, number


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("monitor", __doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="run folder (logging.folder of its config)")
    add("--once", action="store_true", help="print one frame and end; so it is where the output cannot be drawn on")
    add(
        "--every", type=number(float, least=0.1), default=1.0, metavar="SECONDS", help="time between frames (default 1)"
    )
    add(
        "--silent-after",
        type=number(float, above=0),
        metavar="SECONDS",
        help="call a living run silent when it has written nothing for so long (default: 60, more for slow runs)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)

    from megachiar.monitoring.live import can_draw, print_once, watch
    from megachiar.monitoring.watched_run import WatchedRun, check_is_run
    from megachiar.reporting.run_names import name_runs

    folders = list({folder.resolve(): folder for folder in options.runs}.values())
    for folder in folders:
        check_is_run(folder)
    names = [name.label for name in name_runs(folders)]
    runs = [WatchedRun(folder, name, options.silent_after) for folder, name in zip(folders, names, strict=True)]
    if options.once or not can_draw():
        print_once(runs)
    else:
        watch(runs, options.every)
    return 0
