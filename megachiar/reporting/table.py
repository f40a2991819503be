"""A table of a report: rows of values, which CSV has in full, and columns as a reader sees them, for LaTeX and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
NOTHING = "-"
"""What a cell without a value shows."""


@dataclass(frozen=True)
class Column:
    """A column as a reader sees it.

    Attributes:
        heading: its first line.
        show: returns the text of a cell, of a row; empty for none.
        is_text: whether it holds words, which stand left and may be long, and not numbers, which stand right.
    """

    heading: str
    show: Callable[[Row], str]
    is_text: bool = False


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Attributes:
        name: of its files.
        title: in words.
        keys: columns of the CSV file, each a key of the rows.
        rows: values by key; a key that is missing has no value.
        columns: what LaTeX and HTML show. A column whose cells are all empty is left out.
        note: what a reader has to know to read it rightly.
    """

    name: str
    title: str
    keys: Sequence[str]
    rows: Sequence[Row]
    columns: Sequence[Column]
    note: str = ""

    def shown(self) -> tuple[list[Column], list[list[str]]]:
        """Return the columns that are not empty, and the texts of each row."""
        texts = [[column.show(row) for column in self.columns] for row in self.rows]
        kept = [place for place in range(len(self.columns)) if any(row[place] for row in texts)]
        return [self.columns[place] for place in kept], [[row[place] or NOTHING for place in kept] for row in texts]

    def as_csv(self) -> str:
        """Return the rows with all digits; a missing value is an empty field."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.keys)
        writer.writerows([[row.get(key) for key in self.keys] for row in self.rows])
        return text.getvalue()


def text(heading: str, key: str) -> Column:
    """Return a column of words."""
    return Column(heading, lambda row: "" if row.get(key) is None else str(row[key]), is_text=True)


def whole(heading: str, key: str) -> Column:
    """Return a column of whole numbers, such as 12,345."""
    return Column(heading, lambda row: "" if row.get(key) is None else f"{row[key]:,.0f}")


def decimal(heading: str, key: str, digits: int) -> Column:
    """Return a column of numbers with so many digits behind the point."""
    return Column(heading, lambda row: "" if row.get(key) is None else f"{row[key]:,.{digits}f}")


def percent(heading: str, key: str) -> Column:
    """Return a column of shares, such as 12.5 %."""
    return Column(heading, lambda row: "" if row.get(key) is None else f"{row[key]:.1%}".replace("%", " %"))


def short(heading: str, key: str) -> Column:
    """Return a column of large numbers with a letter for thousands, millions and so on, such as 1.25 M."""
    return Column(heading, lambda row: "" if row.get(key) is None else shortened(row[key]))


def shortened(value: float) -> str:
    """Return a number with three digits or more, and a letter for its thousands."""
    for limit, letter in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}" if abs(value) < 1000 * limit else f"{value / limit:,.0f}{letter}"
    return f"{value:.3g}"
