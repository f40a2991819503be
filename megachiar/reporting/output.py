"""Write the files of a report to its folder, each whole or not at all.

FOLDER/report.json       which files are the report's; written first, so that a folder is known as ours at any time
FOLDER/tables/*.csv, *.tex
FOLDER/figures/*.png, *.pdf
FOLDER/report.html       written last

A report that is made again replaces its files and removes those that it does not have any more; other files stay.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.errors import UserError, disk_errors

RECORD = "report.json"
PAGE = "report.html"
_MADE_BY = "megachiar report"


def check_output(folder: Path, overwrite: bool, runs: Iterable[Path]) -> None:
    """Check that a report may be written to ``folder``, before any work.

    Args:
        folder: of the report.
        overwrite: whether it may hold something else.
        runs: folders of the runs, none of which becomes a report.

    Raises:
        UserError: it is a file, or a run, or holds something else than a report.
    """
    with disk_errors(folder, "write"):
        if folder.exists() and not folder.is_dir():
            raise UserError(folder, "is a file", "name a folder for the report")
        if any(folder.resolve() == run.resolve() for run in runs):
            raise UserError(folder, "is a run that the report is about", "name another folder for the report")
        if folder.is_dir() and any(folder.iterdir()) and files_of(folder) is None and not overwrite:
            problem = "exists already and is no report"
            raise UserError(folder, problem, "name another folder, or add --overwrite: files of other names stay")


def files_of(folder: Path) -> list[str] | None:
    """Return the files of the report in ``folder``, by their paths in it; None if it holds no report."""
    try:
        record = json.loads(read_regular(folder / RECORD))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("made_by") != _MADE_BY:
        return None
    names = record.get("files")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def write_report(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files of a report, by their paths in ``folder``.

    Raises:
        UserError: the disk refuses one.
    """
    before = [name for name in files_of(folder) or [] if name not in files and _is_ours(name)]
    _write_record(folder, [*files, *before])
    for name, content in sorted(files.items(), key=lambda item: item[0] == PAGE):
        write_atomically(folder / name, content)
    for name in before:
        with disk_errors(folder / name), contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
    _write_record(folder, list(files))


def _is_ours(name: str) -> bool:
    """Return whether a record may name this file: an edited one must not make us remove another."""
    room, _, file = name.rpartition("/")
    return room in ("", "tables", "figures") and file not in ("", ".", "..")


def _write_record(folder: Path, files: Sequence[str]) -> None:
    record = {"made_by": _MADE_BY, "files": sorted(files)}
    write_atomically(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
