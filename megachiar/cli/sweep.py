"""Train the variants of a config with several seeds, and compare them: one table with mean, spread and differences.

    megachiar sweep ablation                        # a shipped sweep, or the path of a file
    megachiar sweep mine.yaml --dry-run             # check every cell, and train nothing
    megachiar sweep mine.yaml                       # one cell after another; started again it goes on
    megachiar sweep mine.yaml --status
    megachiar sweep mine.yaml --table --json
    megachiar sweep mine.yaml --collect findings
    megachiar sweep mine.yaml --from findings       # go on, perhaps on another machine, where those results end
    megachiar sweep mine.yaml --slurm               # a Slurm array, a task for each cell

Exit codes: 0, every cell is finished; 1, a cell failed, and the others went on; 2, one message says what to correct;
75, a signal stopped the sweep, and the same command continues it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megachiar.console import make_console
from megachiar.errors import UserError
from megachiar.options import CommandParser

if TYPE_CHECKING:
    from rich.console import Console

    from megachiar.config.sweep import Sweep
    from megachiar.sweeps.cells import Cell
    from megachiar.sweeps.status import CellStatus
    from megachiar.sweeps.table import Results


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("sweep", __doc__)
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="file of the sweep, or name of a shipped one")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="check every cell and show how far each is")
    action.add_argument("--status", action="store_true", help="show how far each cell is")
    action.add_argument("--table", action="store_true", help="print the table of the cells that are finished")
    action.add_argument("--collect", type=Path, metavar="FOLDER", help="copy results and table there, without weights")
    action.add_argument("--slurm", action="store_true", help="queue the cells as Slurm arrays (from a checkout)")
    action.add_argument(
        "--cell", metavar="VARIANT/seed_N", help="print the config of this cell, ready to train; nothing if finished"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="these variants alone")
    parser.add_argument(
        "--rerun-changed", action="store_true", help="train cells anew whose config has changed; old runs are renamed"
    )
    parser.add_argument(
        "--from",
        type=Path,
        metavar="FOLDER",
        dest="collected",
        help="cells whose results were collected there, perhaps on another machine, count as finished",
    )
    parser.add_argument("--json", action="store_true", help="--table and --status: print one JSON object")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    from megachiar.config.shipped import find_sweep
    from megachiar.config.sweep import load_sweep
    from megachiar.launch import quiet_deepspeed

    quiet_deepspeed()
    sweep = load_sweep(find_sweep(options.sweep))

    from megachiar.sweeps.cells import cell_named, cells_of
    from megachiar.sweeps.collect import (
        collect,
        collected_before,
        collected_status,
        finished_results,
        restorable,
        restore,
    )
    from megachiar.sweeps.status import status_of

    console, cells = make_console(), cells_of(sweep, options.only)
    if options.cell is not None:
        return print_cell(cell_named(sweep, options.cell), console)
    elsewhere: dict[str, CellStatus] = {}
    if (folder := options.collected) is not None:
        statuses = [collected_status(cell, folder) for cell in cells]
        for status in statuses:
            if status.state == "changed":
                message = f"{status.cell.name}: its result in {folder} is left out: {status.detail}"
                console.print(message, style="yellow", markup=False)
        if options.table:
            return print_table(sweep, finished_results(statuses), options.json)
        elsewhere = restorable(cells, folder)
        if not (options.status or options.dry_run):
            restore(elsewhere, folder)
        for name in elsewhere:
            console.print(f"{name}: its result is taken from {folder}", markup=False)
    statuses = [status_of(cell, elsewhere) for cell in cells]
    if options.table or options.collect is not None:
        for status in statuses:
            if status.state == "changed":
                console.print(f"{status.cell.name}: is left out: {status.detail}", style="yellow", markup=False)
    if options.table:
        return print_table(sweep, finished_results(statuses), options.json)
    if options.collect is not None:
        written = collect(sweep, statuses, options.collect)
        if before := collected_before(sweep, statuses, options.collect):
            named = ", ".join(before[:5]) + (f" and {len(before) - 5} more" if len(before) > 5 else "")
            how = f"--from {options.collect} without --only adds those that fit"
            console.print(f"the table has no {named}, collected before: {how}", style="yellow", markup=False)
        console.print(f"{len(written)} files below {options.collect / sweep.path.stem}", markup=False)
        return 0
    if options.status:
        print_status(statuses, options.json)
        return 0
    return train(sweep, cells, statuses, options, console)


def train(
    sweep: Sweep, cells: Sequence[Cell], statuses: Sequence[CellStatus], options: argparse.Namespace, console: Console
) -> int:
    """Check every cell, and then train them here or queue them, unless it is a dry run; return the exit code."""
    from megachiar.sweeps import run_cells, slurm
    from megachiar.sweeps.collect import finished_results
    from megachiar.sweeps.status import status_of
    from megachiar.sweeps.table import rows_of, write_tables

    run_cells.check_cells(sweep, cells)
    if not options.rerun_changed:
        run_cells.refuse_changed(statuses)
    if options.dry_run:
        print_status(statuses, options.json)
        return 0
    for status in statuses:
        if status.state == "changed":
            kept = run_cells.set_run_aside(status.cell)
            console.print(f"{status.cell.name}: {status.detail}; its run is now {kept}", style="yellow", markup=False)
    if options.slurm:
        for line in slurm.submit(sweep, [status_of(cell) for cell in cells]):
            console.print(line, markup=False)
        return 0
    runner = run_cells.SweepRunner(sweep, console.print)
    runner.pass_on_signals()
    code = runner.run(cells)
    results = finished_results([status_of(cell) for cell in cells])
    if results:
        rows = rows_of(sweep, results)
        written = write_tables(sweep.config.folder, sweep, results, rows)
        print_table(sweep, results, as_json=False)
        console.print(f"the whole table: {' and '.join(map(str, written))}", markup=False)
    return code


def print_cell(cell: Cell, console: Console) -> int:
    """Print the path of a cell's config on standard output, once it can be trained; nothing if it is finished."""
    from megachiar.sweeps import run_cells
    from megachiar.sweeps.status import status_of

    status = status_of(cell)
    run_cells.refuse_changed([status])
    if status.state == "finished":
        console.print(f"{cell.name} is finished", markup=False)
    else:
        print(run_cells.prepare(cell, console.print))
    return 0


def print_table(sweep: Sweep, results: Results, as_json: bool) -> int:
    """Print the table on standard output, as JSON or for a terminal; return the exit code."""
    from megachiar.sweeps.table import rich_table, rows_of, table_as_json

    rows = rows_of(sweep, results)
    if as_json:
        print(json.dumps(table_as_json(sweep, results, rows)))
    elif not rows:
        raise UserError(sweep.config.folder, "holds no finished cell", "`megachiar sweep` trains them")
    else:
        make_console(sys.stdout).print(rich_table(sweep, rows))
    return 0


def print_status(statuses: Sequence[CellStatus], as_json: bool) -> None:
    """Print how far each cell is on standard output."""
    if as_json:
        print(json.dumps({s.cell.name: {"state": s.state, "detail": s.detail} for s in statuses}))
        return
    width = max(len(status.cell.name) for status in statuses)
    for status in statuses:
        print(f"{status.cell.name:{width}}  {status.state:8}  {status.detail}".rstrip())
