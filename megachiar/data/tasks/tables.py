"""Read tables of examples, tab-separated or comma-separated, and name file and line of a bad row."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megachiar.data.inputs.documents import InvalidDocument, InvalidDocumentLog
from megachiar.data.storage.regular_file import open_regular
from megachiar.errors import UserError, disk_errors

LONGEST_FIELD = 64 << 20  # characters
LARGEST_LABEL = 2**31 - 1
SHOWN = 40  # characters of a value in a message


@dataclass(frozen=True)
class Table:
    """Say how a table is written.

    Attributes:
        columns: the columns of each row in order; None where the first row names them.
        quoted: whether a field may stand in double quotes, as programs write tables; else a quote is a character.
    """

    columns: tuple[str, ...] | None = None
    quoted: bool = True


def read_table(path: Path, table: Table, log: InvalidDocumentLog) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place and the fields of each row; what cannot be read goes to ``log``.

    The fields of a file ``.csv`` are separated by commas, those of any other by tabs.

    Raises:
        UserError: the file cannot be read, its quotes do not close, or ``log`` refuses a row.
    """
    with disk_errors(path, "read"), open_regular(path) as raw, open(raw.fileno(), "rb", closefd=False) as file:
        lines = _Lines(path, file, log)
        csv.field_size_limit(LONGEST_FIELD)
        rows = csv.reader(
            lines,
            delimiter="," if path.suffix == ".csv" else "\t",
            quoting=csv.QUOTE_MINIMAL if table.quoted else csv.QUOTE_NONE,
            strict=True,
        )
        columns = table.columns
        try:
            for row in rows:
                where = f"{path}:{lines.number}"
                if columns is None:
                    columns = tuple(name.strip() for name in row)
                elif row and len(row) == len(columns):
                    yield where, dict(zip(columns, row, strict=True))
                elif row:
                    problem = f"has {len(row)} fields, but rows have {len(columns)}: {', '.join(columns)}"
                    log.add(InvalidDocument("missing_text", where, problem))
        except csv.Error as error:
            raise UserError(
                f"{path}:{lines.number}", f"is no row of a table: {error}", "write the file again"
            ) from None


class _Lines(Iterator[str]):
    """Give the lines of a file as text, and count them; a line that is not UTF-8 goes to the log."""

    def __init__(self, path: Path, file: BinaryIO, log: InvalidDocumentLog):
        self._path, self._file, self._log = path, file, log
        self.number = 0

    def __next__(self) -> str:
        for line in self._file:
            self.number += 1
            try:
                return line.decode("utf-8-sig" if self.number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = f"byte 0x{line[error.start]:02x} is not valid UTF-8"
                self._log.add(InvalidDocument("invalid_utf8", f"{self._path}:{self.number}", problem))
        raise StopIteration


def need_columns(path: Path, where: str, row: Mapping[str, str], wanted: Sequence[str]) -> None:
    """Refuse a table without one of the columns ``wanted``.

    Raises:
        UserError: the message has the columns that there are.
    """
    missing = next((name for name in wanted if name not in row), None)
    if missing is not None:
        problem = f"has no column {missing!r}, only {', '.join(row)}"
        raise UserError(path, problem, f"name the columns in the first line: {', '.join(wanted)}")


def whole_number(where: str, text: str, log: InvalidDocumentLog) -> int | None:
    """Return a label that is a whole number, such as ``1`` or ``1.0``; None for another one, which goes to ``log``."""
    try:
        value = float(text)
        if value.is_integer() and abs(value) <= LARGEST_LABEL:
            return int(value)
    except ValueError:
        pass
    log.add(InvalidDocument("bad_label", where, f"label {text[:SHOWN]!r} is no whole number"))
    return None


def filled(where: str, row: Mapping[str, str], columns: Sequence[str], log: InvalidDocumentLog) -> bool:
    """Return whether no field of ``columns`` is empty; an empty one goes to ``log``."""
    empty = next((name for name in columns if not row[name].strip()), None)
    if empty is not None:
        log.add(InvalidDocument("empty", where, f"field {empty!r} is empty"))
    return empty is None


def find_file(folder: Path, names: Sequence[str]) -> Path | None:
    """Return the first of ``names`` that is a file in ``folder``; None if none is."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def check_folder(folder: Path) -> None:
    """Refuse what is no folder.

    Raises:
        UserError: there is no such folder.
    """
    with disk_errors(folder, "read"):
        if not folder.is_dir():
            what = "is a file" if folder.exists() else "does not exist"
            raise UserError(f"--from {folder}", what, "give the folder that holds the files of the task")
