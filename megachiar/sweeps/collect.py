"""The results of a sweep as small files, without weights: read from its run folders, or from a folder of copies.

COLLECTED/SWEEP/VARIANT/seed_1.json              results.json of the cell, seal included
COLLECTED/SWEEP/VARIANT/seed_1.measured.json     what was measured for it on other variants' runs
COLLECTED/SWEEP/sweep.yaml, table.json, table.csv
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megachiar.config.sweep import Sweep
from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.errors import disk_errors
from megachiar.sweeps.cells import Cell
from megachiar.sweeps.measured import SUFFIX
from megachiar.sweeps.status import CellStatus
from megachiar.sweeps.table import Results, rows_of, write_tables
from megachiar.training.run_result import RunResult, read_result_file, result_path

SWEEP_FILE = "sweep.yaml"


def finished_results(statuses: Sequence[CellStatus]) -> dict[str, dict[int, RunResult]]:
    """Return the results of the cells that are finished, by variant and seed."""
    found: dict[str, dict[int, RunResult]] = {}
    for status in statuses:
        if status.result is not None:
            found.setdefault(status.cell.variant.name, {})[status.cell.seed] = status.result
    return found


def collect(sweep: Sweep, statuses: Sequence[CellStatus], folder: Path) -> list[Path]:
    """Copy what the finished cells have measured to ``folder``, and return the files that were written.

    Raises:
        UserError: a file cannot be read or written.
    """
    target = folder / sweep.path.stem
    written = []
    for cell in (status.cell for status in statuses if status.result is not None):
        copy = collected_path(target, cell)
        pairs = [(result_path(cell.run), copy), (cell.file(SUFFIX), copy.with_name(f"seed_{cell.seed}{SUFFIX}"))]
        for source, path in pairs:
            if source.exists():
                with disk_errors(source, "read"):
                    content = read_regular(source)
                write_atomically(path, content)
                written.append(path)
    results = finished_results(statuses)
    with disk_errors(sweep.path, "read"):
        text = read_regular(sweep.path)
    write_atomically(target / SWEEP_FILE, text)
    return [*written, target / SWEEP_FILE, *write_tables(target, sweep, results, rows_of(sweep, results))]


def collected_results(cells: Sequence[Cell], folder: Path) -> Results:
    """Return the results that ``collect`` has copied to ``folder``, by variant and seed.

    Raises:
        UserError: a copy is damaged or cannot be read.
    """
    found: dict[str, dict[int, RunResult]] = {}
    for cell in cells:
        result = read_result_file(collected_path(folder / cell.sweep.path.stem, cell))
        if result is not None:
            found.setdefault(cell.variant.name, {})[cell.seed] = result
    return found


def collected_path(folder: Path, cell: Cell) -> Path:
    """Return the copy of the result of a cell below the folder of its sweep."""
    return folder / cell.variant.name / f"seed_{cell.seed}.json"
