"""The results of a sweep as small files, without weights: read from its run folders, or from a folder of copies.

COLLECTED/SWEEP/VARIANT/seed_1.json              results.json of the cell, seal included
COLLECTED/SWEEP/VARIANT/seed_1.measured.json     what was measured for it on other variants' runs
COLLECTED/SWEEP/sweep.yaml, table.json, table.csv
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megachiar.config.identity import config_digest
from megachiar.config.sweep import Sweep
from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.errors import disk_errors
from megachiar.sweeps.cells import Cell
from megachiar.sweeps.measured import SUFFIX, read_measured_file
from megachiar.sweeps.status import CellStatus, is_new
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
        pairs = [(result_path(cell.run), copy), (cell.file(SUFFIX), _measured_copy(copy, cell))]
        written += [target for source, target in pairs if _copy_if_there(source, target)]
    results = finished_results(statuses)
    with disk_errors(sweep.path, "read"):
        text = read_regular(sweep.path)
    write_atomically(target / SWEEP_FILE, text)
    return [*written, target / SWEEP_FILE, *write_tables(target, sweep, results, rows_of(sweep, results))]


def restore(cells: Sequence[Cell], folder: Path) -> list[Cell]:
    """Put collected results into the run folders of new cells, so that these count as finished; return the cells.

    A result is left where it is if it is of another config than the cell's, or if another cell has still to be measured
    on the run, whose checkpoints were not collected.

    Args:
        cells: of a sweep, sources before the cells that wait for them.
        folder: that ``collect`` has written to, here or on another machine.

    Raises:
        UserError: a copy is damaged, or a file cannot be read or written.
    """
    found = {cell.name: cell for cell in cells if _fits(cell, folder)}
    for cell in reversed(cells):
        if cell.name not in found and read_measured_file(cell.file(SUFFIX)) is None:
            for source in cell.sources:
                found.pop(source.name, None)
    restored = [cell for cell in found.values() if is_new(cell)]
    for cell in restored:
        copy = collected_path(folder / cell.sweep.path.stem, cell)
        _copy_if_there(_measured_copy(copy, cell), cell.file(SUFFIX))
        _copy_if_there(copy, result_path(cell.run))
    return restored


def _copy_if_there(source: Path, target: Path) -> bool:
    """Copy a small file, whole or not at all, and return whether there was one."""
    if not source.exists():
        return False
    with disk_errors(source, "read"):
        content = read_regular(source)
    write_atomically(target, content)
    return True


def _fits(cell: Cell, folder: Path) -> bool:
    """Return whether the collected result of a cell is there, and of the config that the cell has."""
    copy = collected_path(folder / cell.sweep.path.stem, cell)
    result, measured = read_result_file(copy), None
    if result is None:
        return False
    if cell.sources:
        measured = read_measured_file(_measured_copy(copy, cell))
        if measured is None or not measured.is_of(cell):
            return False
    return result.config_digest == config_digest(cell.config(measured.keys if measured is not None else None))


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


def _measured_copy(copy: Path, cell: Cell) -> Path:
    """Return the file beside the collected result ``copy`` with what was measured for the cell."""
    return copy.with_name(f"seed_{cell.seed}{SUFFIX}")
