"""Make a report of runs: read them, compute the tables, draw the figures, write the folder.

run folders, sweep --> ReportedRun --> numbers --> tables  --> CSV, LaTeX --.
                           |                                                 >-- report.html
                           `--> history, models --> figures --> PNG, PDF ---'
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megachiar.errors import UserError
from megachiar.reporting import ablation_figure, curve_figures, route_figures
from megachiar.reporting.ablation import Ablation, ablation_table, compare
from megachiar.reporting.drawing import Picture, check_matplotlib, draw
from megachiar.reporting.latex import as_latex, document
from megachiar.reporting.measures import all_sets, numbers_of
from megachiar.reporting.model_looks import Looks, LookSettings, continuations_table, look_at_models, routes_table
from megachiar.reporting.notes import Notes
from megachiar.reporting.output import PAGE
from megachiar.reporting.page import report_page
from megachiar.reporting.reported_run import ReportedRun
from megachiar.reporting.result_tables import classification_table, main_table, sets_table, wikitext_2_table
from megachiar.reporting.table import Table

Log = Callable[[str], None]


@dataclass(frozen=True)
class ReportSettings:
    """What a report shows.

    Attributes:
        reference: variant that the others are compared with; None for the first one.
        looks: how models are looked at; None loads no weights.
        has_figures: whether figures are drawn.
    """

    reference: str | None = None
    looks: LookSettings | None = field(default_factory=LookSettings)
    has_figures: bool = True


def make_report(runs: Sequence[ReportedRun], settings: ReportSettings, notes: Notes, log: Log) -> dict[str, bytes]:
    """Return the files of the report of ``runs``, by their paths in its folder.

    Args:
        runs: in the order in which they are shown.
        settings: what is shown.
        notes: take what is left out, and hold what was so already.
        log: is told what takes time.

    Raises:
        UserError: ``settings.reference`` is no variant of a finished run.
    """
    numbers = [numbers_of(run) for run in runs]
    ablation = compare(numbers, settings.reference, notes)
    looks = Looks() if settings.looks is None else look_at_models(runs, settings.looks, notes, log)
    tables = [main_table(numbers), *_comparison(ablation, notes), *_of_sets(runs, notes)]
    if looks.continuations and settings.looks is not None:
        tables.append(continuations_table(looks, settings.looks))
    elif settings.looks is not None:
        notes.add("table continuations", "no run has a model that can be opened")
    names = file_names(run.label for run in runs)
    pictures: list[Picture] = []
    if settings.has_figures:
        try:
            check_matplotlib()
            log("figures")
            pictures = draw_all(runs, ablation, looks, names, notes)
        except UserError as error:
            notes.add("all figures", error)
    routes = [routes_table(label, f"routes_{names[label]}", found) for label, found in looks.routes.items()]
    return _files(tables, routes, pictures, notes)


def _comparison(ablation: Ablation | None, notes: Notes) -> list[Table]:
    if ablation is None:
        notes.add("table and figure ablation", "fewer than two variants have finished runs")
        return []
    return [ablation_table(ablation)]


def _of_sets(runs: Sequence[ReportedRun], notes: Notes) -> list[Table]:
    """Return the tables of measured sets that have rows."""
    rows = [row for run in runs for row in all_sets(run)]
    found = []
    for table, why in (
        (wikitext_2_table(rows), "no run was measured on a set named like WikiText-2"),
        (classification_table(rows), "no run was measured on a labelled set"),
        (sets_table(rows), "no run was measured on any set"),
    ):
        if table.rows:
            found.append(table)
        else:
            notes.add(f"table {table.name}", why)
    return found


def draw_all(
    runs: Sequence[ReportedRun], ablation: Ablation | None, looks: Looks, names: Mapping[str, str], notes: Notes
) -> list[Picture]:
    """Draw every figure that the runs have the numbers for; what is left out is noted."""
    found = [_draw_ablation(ablation)] if ablation is not None and ablation.compared() else []
    found += _draw_curves(runs, notes)
    gates = curve_figures.gates(runs)
    if gates:
        note = "Mean over tokens of layer 1, as logged; of a mixed run by task."
        found.append(draw("gate", "Gate of the MetaRouter", note, lambda: curve_figures.draw_gates(gates)))
    else:
        notes.add("figure gate", "no run has logged a gate")
    return found + _draw_shares(runs, names, notes) + _draw_heatmaps(looks, names)


def _draw_ablation(ablation: Ablation) -> Picture:
    note = (
        f"Bars at the left: standard deviation over seeds. At the right: paired differences from {ablation.reference}."
    )
    return draw("ablation", "Variants and their differences", note, lambda: ablation_figure.draw_ablation(ablation))


def _draw_curves(runs: Sequence[ReportedRun], notes: Notes) -> list[Picture]:
    texts, labelled = [run for run in runs if not run.classifies], [run for run in runs if run.classifies]
    found = []
    for name, title, members, value, unit in (
        ("training_curves", "Training curves", texts, "loss", "nats a token"),
        ("classification_curves", "Training curves of classifications", labelled, "loss", "nats an example"),
        ("accuracy", "Accuracy of classifications", labelled, "accuracy", "accuracy"),
    ):
        rows = curve_figures.training_panels(members, value, value)
        if rows:
            drawn = functools.partial(curve_figures.draw_panels, rows, members, unit)
            found.append(draw(name, title, "", drawn))
        elif members:
            notes.add(f"figure {name}", f"no run has logged {'a loss' if value == 'loss' else 'an accuracy'}")
    rates = curve_figures.learning_rates(runs)
    if rates:
        found.append(draw("learning_rate", "Learning rate", "", lambda: curve_figures.draw_panels(rates, runs, "")))
    return found


def _draw_shares(runs: Sequence[ReportedRun], names: Mapping[str, str], notes: Notes) -> list[Picture]:
    named = {run.label: curve_figures.routed_shares(run) for run in runs if run.opens_model}
    shown = {label: shares for label, shares in named.items() if shares}
    if not shown:
        notes.add("figures attention_share", "no run has logged the shares of routed layers")
    return [
        draw(
            f"attention_share_{names[label]}",
            f"Attention share of each routed layer: {label}",
            "",
            functools.partial(curve_figures.draw_shares, label, shares),
        )
        for label, shares in shown.items()
    ]


def _draw_heatmaps(looks: Looks, names: Mapping[str, str]) -> list[Picture]:
    found = []
    for label, routes in looks.routes.items():
        count = len(routes.tokens)
        note = f"Checkpoint of step {looks.steps[label]:,}."
        if count > route_figures.MOST_TOKENS:
            note += f" The first {route_figures.MOST_TOKENS} of {count:,} tokens; the CSV file has all."
        picture = draw(
            f"heatmap_{names[label]}",
            f"Routes of a text: {label}",
            note,
            functools.partial(route_figures.draw_heatmap, label, routes),
        )
        found.append(picture)
    return found


def file_names(labels: Iterable[str]) -> dict[str, str]:
    """Return a part of a file name for each label, different ones for different labels."""
    names: dict[str, str] = {}
    for label in labels:
        wanted = re.sub(r"[^A-Za-z0-9.=+-]+", "_", label).strip("._") or "run"
        name, number = wanted, 2
        while name.lower() in {taken.lower() for taken in names.values()}:
            name, number = f"{wanted}_{number}", number + 1
        names[label] = name
    return names


def _files(
    tables: Sequence[Table], routes: Sequence[Table], pictures: Sequence[Picture], notes: Notes
) -> dict[str, bytes]:
    found = {f"tables/{table.name}.csv": _bytes(table.as_csv()) for table in [*tables, *routes]}
    found |= {f"tables/{table.name}.tex": _bytes(as_latex(table)) for table in tables}
    found["tables/all_tables.tex"] = _bytes(document([table.name for table in tables]))
    for picture in pictures:
        found[f"figures/{picture.name}.png"] = picture.png
        found[f"figures/{picture.name}.pdf"] = picture.pdf
    found[PAGE] = _bytes(report_page(tables, pictures, notes.lines))
    return found


def _bytes(content: str) -> bytes:
    return content.encode("utf-8", "replace")
