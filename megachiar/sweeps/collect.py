"""The results of a sweep as small files, without weights: read from its run folders, or from a folder of copies.

COLLECTED/SWEEP/VARIANT/seed_1.json              results.json of the cell, seal included
COLLECTED/SWEEP/VARIANT/seed_1.measured.json     what was measured for it on other variants' runs
COLLECTED/SWEEP/sweep.yaml, table.json, table.csv
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megachiar.config.identity import config_digest
from megachiar.config.sweep import Sweep
from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.errors import disk_errors
from megachiar.sweeps.cell_data import other_data
from megachiar.sweeps.cells import Cell, cells_of
from megachiar.sweeps.measured import SUFFIX, Measured, read_measured_file
from megachiar.sweeps.status import CellStatus, is_new
from megachiar.sweeps.table import rows_of, write_tables
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


def collected_before(sweep: Sweep, statuses: Sequence[CellStatus], folder: Path) -> list[str]:
    """Return the names of cells that ``collect`` leaves out of the table, though their results lie in ``folder``."""
    finished = {status.cell.name for status in statuses if status.result is not None}
    target = folder / sweep.path.stem
    return [
        cell.name for cell in cells_of(sweep) if cell.name not in finished and collected_path(target, cell).exists()
    ]


def restorable(cells: Sequence[Cell], folder: Path) -> dict[str, CellStatus]:
    """Return the new cells that are finished by collected results, by name.

    A result does not count if it is of another config or other data than the cell's, or if another cell has still to be
    measured on the run, whose checkpoints were not collected.

    Args:
        cells: of a sweep, sources before the cells that wait for them.
        folder: that ``collect`` has written to, here or on another machine.

    Raises:
        UserError: a copy is damaged, or a file cannot be read.
    """
    found = fitting(cells, folder)
    for cell in reversed(cells):
        if cell.name not in found and read_measured_file(cell.file(SUFFIX)) is None:
            for source in cell.sources:
                found.pop(source.name, None)
    return {name: status for name, status in found.items() if is_new(status.cell)}


def restore(statuses: Mapping[str, CellStatus], folder: Path) -> None:
    """Put collected results into the run folders of the cells that ``restorable`` returns.

    Raises:
        UserError: a file cannot be read or written.
    """
    for cell in (status.cell for status in statuses.values()):
        copy = collected_path(folder / cell.sweep.path.stem, cell)
        _copy_if_there(_measured_copy(copy, cell), cell.file(SUFFIX))
        _copy_if_there(copy, result_path(cell.run))


def fitting(cells: Sequence[Cell], folder: Path) -> dict[str, CellStatus]:
    """Return the cells whose collected results are of the config and the data that the cells have, by name.

    Raises:
        UserError: a copy is damaged, or a file cannot be read.
    """
    statuses = (collected_status(cell, folder) for cell in cells)
    return {status.cell.name: status for status in statuses if status.state == "finished"}


def _copy_if_there(source: Path, target: Path) -> bool:
    """Copy a small file, whole or not at all, and return whether there was one."""
    if not source.exists():
        return False
    with disk_errors(source, "read"):
        content = read_regular(source)
    write_atomically(target, content)
    return True


def collected_status(cell: Cell, folder: Path) -> CellStatus:
    """Return how far a cell is by its collected result alone: new without one, changed if it is another cell's now.

    Raises:
        UserError: the copy is damaged, or a file cannot be read.
    """
    copy = collected_path(folder / cell.sweep.path.stem, cell)
    result, keys = read_result_file(copy), None
    if result is None:
        return CellStatus(cell, "new")
    if cell.sources:
        measured = read_measured_file(_measured_copy(copy, cell))
        if measured is None or not measured.is_of(cell) or not _measured_on_these_sources(cell, measured, folder):
            return CellStatus(cell, "changed", "what was measured for it was asked for or measured otherwise")
        keys = measured.keys
    config = cell.config(keys)
    if result.config_digest != config_digest(config):
        return CellStatus(cell, "changed", "has another config", config)
    if (path := other_data(result, config)) is not None:
        return CellStatus(cell, "changed", f"was trained or measured on another dataset {path}", config)
    return CellStatus(cell, "finished", f"its result is in {folder}", config, result)


def _measured_on_these_sources(cell: Cell, measured: Measured, folder: Path) -> bool:
    """Return whether ``measured`` was measured on runs of the configs that the sources of a cell have now.

    A source that was itself measured on another cell tells its config only where its own record was collected.
    """
    for source in cell.sources:
        keys = None
        if source.sources:
            record = read_measured_file(_measured_copy(collected_path(folder / cell.sweep.path.stem, source), source))
            if record is None:
                continue
            if not record.is_of(source) or not _measured_on_these_sources(source, record, folder):
                return False
            keys = record.keys
        if measured.sources.get(source.variant.name) != config_digest(source.config(keys)):
            return False
    return True


def collected_path(folder: Path, cell: Cell) -> Path:
    """Return the copy of the result of a cell below the folder of its sweep."""
    return folder / cell.variant.name / f"seed_{cell.seed}.json"


def _measured_copy(copy: Path, cell: Cell) -> Path:
    """Return the file beside the collected result ``copy`` with what was measured for the cell."""
    return copy.with_name(f"seed_{cell.seed}{SUFFIX}")
