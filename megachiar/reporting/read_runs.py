"""Read the runs of a report: run folders, the cells of a sweep, or the collected results of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megachiar.config.sweep import Sweep
from megachiar.reporting.notes import Notes
from megachiar.reporting.reported_run import ReportedRun, check_run, read_collected, read_run
from megachiar.reporting.run_names import name_runs
from megachiar.sweeps.cells import Cell, cells_of
from megachiar.sweeps.collect import collected_path, collected_status


def read_runs(folders: Sequence[Path], sweep: Sweep | None, collected: Path | None, notes: Notes) -> list[ReportedRun]:
    """Return the runs of a report, those that are named first; each folder counts once.

    Args:
        folders: run folders that are named.
        sweep: whose cells are shown too, those that have begun; their models are not opened.
        collected: folder of the sweep's collected results, to be read in place of its run folders; None for these.
        notes: take what is missing or damaged.

    Raises:
        UserError: a named folder is no run, or a collected result is damaged.
    """
    for folder in folders:
        check_run(folder)
    named = _different(folders, notes)
    cells = [] if sweep is None else _cells(sweep, collected, notes)
    known = {folder.resolve() for folder in named}
    cells = [(cell, place) for cell, place in cells if place.resolve() not in known]
    names = name_runs([*named, *(place for _, place in cells)])
    runs = [read_run(folder, name, notes) for folder, name in zip(named, names, strict=False)]
    for (cell, place), name in zip(cells, names[len(named) :], strict=True):
        if collected is None:
            runs.append(read_run(place, name, notes, opens_model=False))
        elif (found := read_collected(collected_path(collected / cell.sweep.path.stem, cell), name)) is not None:
            runs.append(found)
    return runs


def _different(folders: Sequence[Path], notes: Notes) -> list[Path]:
    found: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in found:
            notes.add(str(folder), f"is the same run as {found[folder.resolve()]}, and is shown once")
        found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _cells(sweep: Sweep, collected: Path | None, notes: Notes) -> list[tuple[Cell, Path]]:
    """Return the cells of a sweep that have anything to show, variant by variant, with the folder that names each."""
    order = list(sweep.variants)
    cells = sorted(cells_of(sweep), key=lambda cell: order.index(cell.variant.name))
    found, missing = [], 0
    for cell in cells:
        if collected is None:
            place, has_begun = cell.run, (cell.run / "metrics.jsonl").exists() or (cell.run / "results.json").exists()
        else:
            status = collected_status(cell, collected)
            place = collected_path(collected / sweep.path.stem, cell).with_suffix("")
            has_begun = status.state == "finished"
            if status.state == "changed":
                notes.add(cell.name, f"its result in {collected} is left out: {status.detail}")
                continue
        if has_begun:
            found.append((cell, place))
        missing += not has_begun
    if missing:
        notes.add(str(sweep.path), f"{missing} of {len(cells)} cells have not begun")
    return found
