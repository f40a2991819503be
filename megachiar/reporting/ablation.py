"""The ablation: finished runs by variant and seed, with mean, spread, and paired differences from a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megachiar.errors import UserError
from megachiar.reporting.measures import Values
from megachiar.reporting.notes import Notes
from megachiar.reporting.table import Column, Row, Table, text, whole
from megachiar.sweeps.statistics import CONFIDENCE, Difference, Spread, paired_difference, spread

MEASURES = {
    "validation_loss": ("val. loss", 4),
    "validation_token_ppl": ("val. PPL", 2),
    "validation_accuracy": ("val. accuracy", 4),
    "test_loss": ("test loss", 4),
    "test_token_ppl": ("test PPL", 2),
    "test_word_ppl": ("test word PPL", 2),
    "test_accuracy": ("test accuracy", 4),
    "attention_share": ("attention", 4),
    "flops_saved": ("FLOPs saved", 4),
    "training_seconds": ("seconds", 0),
}
"""What is compared, with its heading and digits."""
COMPARED = ("test_loss", "test_accuracy", "validation_loss", "validation_accuracy")
"""Of which the first that variants have is shown with its difference."""

SURE = f"{100 * CONFIDENCE:.0f} %"


@dataclass(frozen=True)
class Effect:
    """One measure of one variant.

    Attributes:
        values: by seed.
        spread: of the values.
        difference: from the reference; None for the reference itself, or without a seed in common.
    """

    values: Mapping[int, float]
    spread: Spread
    difference: Difference | None


@dataclass(frozen=True)
class Ablation:
    """All variants of a comparison.

    Attributes:
        reference: name of the variant that the others are compared with.
        effects: by variant and measure, in the order of the runs.
    """

    reference: str
    effects: Mapping[str, Mapping[str, Effect]]

    def compared(self) -> list[str]:
        """Return the measures that at least two variants have and whose differences are shown: one or two."""
        shown = [name for name in COMPARED if sum(name in found for found in self.effects.values()) > 1]
        tests = [name for name in shown if name.startswith("test_")]
        return tests or shown


def compare(numbers: Sequence[Values], reference: str | None, notes: Notes) -> Ablation | None:
    """Return the comparison of the variants that have finished runs; None of fewer than two.

    Args:
        numbers: of each run.
        reference: variant that the others are compared with; None for the first one.
        notes: take runs that are left out.

    Raises:
        UserError: no finished run is of the variant ``reference``.
    """
    by_variant: dict[str, dict[int, Values]] = {}
    for row in numbers:
        if not row["finished"]:
            notes.add(row["run"], "is not finished, and so no part of the ablation")
        elif row["seed"] in (seeds := by_variant.setdefault(row["variant"], {})):
            notes.add(row["run"], f"has the seed {row['seed']} as another run of its variant, and is left out there")
        else:
            seeds[row["seed"]] = row
    if reference is not None and reference not in by_variant:
        known = ", ".join(by_variant) or "none"
        raise UserError(f"--reference {reference}", "no finished run is of this variant", f"variants: {known}")
    if not by_variant:
        return None
    first = reference or next(iter(by_variant))
    by_variant = _comparable(by_variant, first, notes)
    if len(by_variant) < 2:
        return None
    effects = {name: _effects(rows, by_variant[first], name == first) for name, rows in by_variant.items()}
    return Ablation(first, effects)


def _comparable(by_variant: Mapping[str, dict[int, Values]], first: str, notes: Notes) -> dict[str, dict[int, Values]]:
    """Return the variants whose runs have the task of the first one and were measured on the same data."""
    wanted = next(iter(by_variant[first].values())).get("measured_on")
    kept: dict[str, dict[int, Values]] = {}
    for variant, rows in by_variant.items():
        for seed, row in rows.items():
            if row.get("measured_on") == wanted:
                kept.setdefault(variant, {})[seed] = row
            else:
                problem = f"has another task or other validation or test data than {first}: its loss does not compare"
                notes.add(f"{row['run']}, ablation", problem)
    return kept


def _effects(rows: Mapping[int, Values], reference: Mapping[int, Values], is_reference: bool) -> dict[str, Effect]:
    found = {}
    for measure in MEASURES:
        values = _values(rows, measure)
        if values:
            difference = None if is_reference else paired_difference(values, _values(reference, measure))
            found[measure] = Effect(values, spread(list(values.values())), difference)
    return found


def _values(rows: Mapping[int, Values], measure: str) -> dict[int, float]:
    return {seed: float(row[measure]) for seed, row in rows.items() if row.get(measure) is not None}


def ablation_table(ablation: Ablation) -> Table:
    """Return the table of a comparison, a row for each variant."""
    keys = ["variant", "seeds"]
    for measure in MEASURES:
        fields = (*Spread._fields, *(f"difference_{name}" for name in Difference._fields))
        keys += [f"{measure}_{field}" for field in fields]
    rows = [_row(variant, effects) for variant, effects in ablation.effects.items()]
    columns = [text("variant", "variant"), whole("seeds", "seeds")]
    compared = ablation.compared()
    for measure, (heading, digits) in MEASURES.items():
        columns.append(Column(heading, _mean(measure, digits)))
        if measure in compared:
            columns.append(Column(f"minus {ablation.reference}, {SURE}", _difference(measure)))
    note = (
        f"Mean ± standard deviation over seeds. Differences are from {ablation.reference} with the same seed, with the "
        f"interval that holds their mean with a confidence of {SURE}."
    )
    return Table("ablation", "Ablation", keys, rows, columns, note)


def _row(variant: str, effects: Mapping[str, Effect]) -> Row:
    row: dict[str, Any] = {"variant": variant, "seeds": max((e.spread.n for e in effects.values()), default=0)}
    for measure, effect in effects.items():
        row |= {f"{measure}_{name}": value for name, value in effect.spread._asdict().items()}
        if effect.difference is not None:
            row |= {f"{measure}_difference_{name}": value for name, value in effect.difference._asdict().items()}
    return row


def _mean(measure: str, digits: int) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        mean, deviation = row.get(f"{measure}_mean"), row.get(f"{measure}_deviation")
        if mean is None:
            return ""
        return f"{mean:,.{digits}f}" + (f" ± {deviation:,.{digits}f}" if deviation is not None else "")

    return show


def _difference(measure: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        mean, low, high = (row.get(f"{measure}_difference_{name}") for name in ("mean", "low", "high"))
        if mean is None:
            return ""
        return f"{mean:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if low is not None else "")

    return show
