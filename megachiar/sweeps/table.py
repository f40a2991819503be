"""The table of a sweep: per variant the mean, spread and paired differences of its measures over the seeds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachiar import __version__
from megachiar.config.sweep import Sweep
from megachiar.data.storage.files import write_atomically
from megachiar.errors import UserError
from megachiar.sweeps.cell_data import check_same_data
from megachiar.sweeps.statistics import CONFIDENCE, Difference, Spread, paired_difference, spread
from megachiar.training.run_result import RunResult

if TYPE_CHECKING:
    from rich.table import Table

JSON_FILE, CSV_FILE = "table.json", "table.csv"
ALWAYS = "attention_share"
Results = Mapping[str, Mapping[int, RunResult]]
"""Variant -> seed -> result of a finished cell."""


@dataclass(frozen=True)
class Row:
    """One measure of one variant.

    Attributes:
        variant: its name.
        measure: dotted name in ``results.json``.
        values: by seed.
        spread: of the values.
        difference: from the reference; None for the reference itself, or without a seed in common.
    """

    variant: str
    measure: str
    values: dict[int, float]
    spread: Spread
    difference: Difference | None

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON has it."""
        return {
            "variant": self.variant,
            "measure": self.measure,
            "values": {str(seed): value for seed, value in self.values.items()},
            **self.spread._asdict(),
            "difference": None if self.difference is None else self.difference._asdict(),
        }


def rows_of(sweep: Sweep, results: Results) -> list[Row]:
    """Return the rows of all measures that the finished cells have, measure by measure.

    Raises:
        UserError: ``measures`` of the sweep names one that no finished cell has, or cells were measured on unlike data.
    """
    check_same_data(results)
    numbers = {
        variant: {seed: numbers_of(result) for seed, result in results[variant].items()}
        for variant in sweep.variants
        if variant in results
    }
    known = list(dict.fromkeys(name for by_seed in numbers.values() for found in by_seed.values() for name in found))
    for name in sweep.config.measures:
        if known and name not in known:
            problem = f"{name} is no measure of a finished cell"
            raise UserError(f"{sweep.path}: measures", problem, f"name some of {', '.join(known)}")
    rows = []
    for measure in known:
        columns = {
            variant: {seed: found[measure] for seed, found in by_seed.items() if measure in found}
            for variant, by_seed in numbers.items()
        }
        reference = columns.get(sweep.reference, {})
        for variant, values in columns.items():
            if values:
                difference = None if variant == sweep.reference else paired_difference(values, reference)
                rows.append(Row(variant, measure, values, spread(list(values.values())), difference))
    return rows


def numbers_of(result: RunResult) -> dict[str, float]:
    """Return every number of a result that a table can show, by dotted name."""
    found: dict[str, float] = {}
    fields = {"test": result.test, "validation": {n: s.model_dump() for n, s in result.validation.items()}}
    for key, value in _leaves(fields):
        if not isinstance(value, bool) and isinstance(value, int | float):
            found[key] = float(value)
    for name in (ALWAYS, "training_seconds", "parameters", "tokens"):
        if (number := getattr(result, name)) is not None:
            found[name] = float(number)
    found["best.step"] = float(result.best.step)
    return found


def shown_measures(sweep: Sweep, rows: Sequence[Row]) -> list[str]:
    """Return the measures that the table on a terminal shows."""
    if sweep.config.measures:
        return list(sweep.config.measures)
    known = list(dict.fromkeys(row.measure for row in rows))
    tests = [name for name in known if name.startswith("test.")]
    held_out = tests or [name for name in known if name.startswith("validation.") and ".best." in name]
    losses = [name for name in held_out if name.endswith(".loss")]
    return losses or held_out


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def table_as_json(sweep: Sweep, results: Results, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the whole table, with what the results were made by."""
    found = [result for by_seed in results.values() for result in by_seed.values()]
    return {
        "sweep": sweep.path.stem,
        "created_by": f"megachiar {__version__}",
        "commits": sorted({result.commit or result.created_by for result in found}),
        "seeds": list(sweep.config.seeds),
        "reference": sweep.reference,
        "confidence": CONFIDENCE,
        "finished": {variant: sorted(by_seed) for variant, by_seed in results.items()},
        "rows": [row.as_dict() for row in rows],
    }


def table_as_csv(rows: Sequence[Row]) -> str:
    """Return a line for each row, without the values of single seeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "measure", *Spread._fields, *(f"difference_{name}" for name in Difference._fields)])
    for row in rows:
        difference = row.difference or [None] * len(Difference._fields)
        writer.writerow([row.variant, row.measure, *row.spread, *difference])
    return text.getvalue()


def write_tables(folder: Path, sweep: Sweep, results: Results, rows: Sequence[Row]) -> list[Path]:
    """Write the table as JSON and CSV to ``folder`` and return both files.

    Raises:
        UserError: the disk refuses them.
    """
    paths = [folder / JSON_FILE, folder / CSV_FILE]
    write_atomically(paths[0], (json.dumps(table_as_json(sweep, results, rows), indent=2) + "\n").encode())
    write_atomically(paths[1], table_as_csv(rows).encode())
    return paths


def rich_table(sweep: Sweep, rows: Sequence[Row]) -> Table:
    """Return the table for a terminal: a line for each variant, with the measures that ``shown_measures`` names."""
    from rich.markup import escape
    from rich.table import Table

    measures = shown_measures(sweep, rows)
    table = Table(title=escape(f"{sweep.path.stem}: mean ± standard deviation"), title_justify="left")
    table.add_column("variant")
    for name in ("seeds", "attention"):
        table.add_column(name, justify="right")
    for measure in measures:
        table.add_column(escape(measure), justify="right")
        table.add_column("range", justify="right")
        table.add_column(escape(f"minus {sweep.reference}, 95 %"), justify="right")
    cells = {(row.variant, row.measure): row for row in rows}
    for variant in dict.fromkeys(row.variant for row in rows):
        share = cells.get((variant, ALWAYS))
        columns = []
        for measure in measures:
            row = cells.get((variant, measure))
            columns += ["", "", ""] if row is None else [*_shown_spread(row.spread), _shown_difference(row.difference)]
        n = max(len(row.values) for row in rows if row.variant == variant)
        table.add_row(escape(variant), str(n), "-" if share is None else f"{share.spread.mean:.1%}", *columns)
    return table


def _shown_spread(value: Spread) -> tuple[str, str]:
    if value.deviation is None:
        return f"{value.mean:.4f}", "-"
    return f"{value.mean:.4f} ± {value.deviation:.4f}", f"{value.least:.4f} to {value.most:.4f}"


def _shown_difference(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.4f}"
    return f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
