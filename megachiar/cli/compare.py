"""Compare runs, finished or running: losses, test results, throughput, shares, FLOPs, time, and their configs.

megachiar compare runs/400m runs/400m_baseline
megachiar compare runs/400m runs/400m_baseline --html comparison.html     # with curves by steps, tokens, time and FLOPs
megachiar compare runs/a runs/b runs/c --csv comparison.csv
megachiar compare runs/a runs/b --json

Losses of other data or of other tokenizers do not compare. Then a warning says so, and no value is called the best.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megachiar.console import make_console, print_warning
from megachiar.options import CommandParser, OptionError, add_json_option


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("compare", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder (logging.folder of its config)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with tables and curves")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the numbers with all digits, a run a row")
    add_json_option(parser)
    options = parser.parse_args(argv)
    if len({run.resolve() for run in options.runs}) < 2:
        problem = "is one run, and a comparison needs two"
        raise OptionError(f"megachiar compare {options.runs[0]}", problem, f"name another one{parser.example('runs')}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_arguments(argv)

    from megachiar.launch import quiet_deepspeed

    quiet_deepspeed()

    from megachiar.data.storage.files import check_writable, write_atomically
    from megachiar.monitoring.watched_run import WatchedRun
    from megachiar.reporting import comparison_output
    from megachiar.reporting.comparison import compare_runs
    from megachiar.reporting.notes import Notes
    from megachiar.reporting.read_runs import read_runs
    from megachiar.viewer.page import check_page

    if options.html is not None:
        check_page(options.html, comparison_output.GENERATOR, "comparison")
    if options.csv is not None:
        check_writable(options.csv)
    notes = Notes()
    runs = read_runs(options.runs, None, None, notes)
    comparison = compare_runs(runs)
    if options.html is not None:
        watched = [WatchedRun(run.folder, run.label) for run in runs if run.folder is not None]
        for each in watched:
            while each.read():
                pass
        comparison_output.write_comparison_page(options.html, comparison, watched)
    if options.csv is not None:
        write_atomically(options.csv, comparison_output.comparison_csv(comparison).encode())
    if options.json:
        print(json.dumps(comparison.as_dict()))
    else:
        comparison_output.print_comparison(make_console(sys.stdout), comparison)
    for line in [*comparison.warnings, *notes.lines]:
        print_warning(line)
    for path in filter(None, (options.html, options.csv)):
        make_console().print(f"wrote {path}", markup=False)
