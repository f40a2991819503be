"""Fill the tables of docs/findings.md from the small files below docs/findings/ that sweeps and analyses have written.

    python docs/generated_pages.py         fills them; a test fails where the page has other numbers

A table stands between two comments of the page:

    <!-- sweep: ablation, test.test.loss -->     variants of a sweep by one measure
    <!-- sweep: controls, test.test.loss, ablation -->    the same; attention is worth what it is in the sweep ablation
    <!-- routing: ablation -->                   what `megachiar analyze-routing` says of the runs of a sweep
    <!-- distance: long_range -->                what `megachiar long-range` says of them
    <!-- end -->

    docs/findings/SWEEP/table.json                      of `megachiar sweep SWEEP --collect docs/findings`
    docs/findings/SWEEP/VARIANT/seed_N.routing.csv      of `megachiar analyze-routing RUN --csv FILE`
    docs/findings/SWEEP/VARIANT/seed_N.distance.json    of `megachiar long-range RUN --data DATA --json`
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "findings"
PAGE = FOLDER.with_suffix(".md")
MARKED = re.compile(r"(<!-- (sweep|routing|distance): ([^>]*?) -->\n).*?(<!-- end -->)", re.S)
REGRET = "regret (0 the oracle, 1 a coin)"
NOISE = "distance of H from white noise"


def filled(text: str, folder: Path = FOLDER) -> str:
    """Return the page with its tables as the files below ``folder`` have them."""

    def table(match: re.Match[str]) -> str:
        begin, kind, words, end = match.groups()
        name, *rest = [word.strip() for word in words.split(",")]
        if kind == "sweep":
            lines = sweep_table(folder / name, rest[0], folder / (rest[1] if len(rest) > 1 else name))
        else:
            lines = (routing_table if kind == "routing" else distance_table)(folder / name)
        return "\n".join([begin, *lines, "", end])

    return MARKED.sub(table, text)


def sweep_table(folder: Path, measure: str, ends: Path) -> Iterator[str]:
    """Yield the lines of a table with a row for each variant: mean, spread, and the difference from the reference.

    What a variant keeps of attention's worth is (loss of tau_1 - its loss) / (loss of tau_1 - loss of tau_0), over the
    seeds that all three have: of their mean losses, and the least and the most of one seed. ``ends`` is the folder of
    the sweep that has these two.
    """
    table, rows = _rows(folder)
    worth = [_rows(ends)[1][variant, measure]["values"] for variant in ("tau_1", "tau_0")]
    yield (
        f"| variant | seeds | attention in each routed layer | {measure} | minus {table['reference']} [95 %] "
        "| kept of attention's worth |"
    )
    yield "|---|---|---|---|---|---|"
    for variant in table["finished"]:
        row = rows.get((variant, measure))
        if row is None:
            continue
        shares = _shares(folder / variant, list(row["values"]))
        numbers = f"{len(row['values'])} | {shares} | {_spread(row)} | {_difference(row['difference'])}"
        yield f"| {variant} | {numbers} | {_kept(row['values'], *worth)} |"


def _shares(folder: Path, seeds: list[str]) -> str:
    """Return the attention share of each routed layer of a variant, the mean over its seeds."""
    results = [json.loads((folder / f"seed_{seed}.json").read_text()) for seed in seeds]
    if any(result["attention_share"] is None for result in results):
        return ""
    layers = zip(*(result["attention_share_of_layers"][1:-1] for result in results), strict=True)
    return ", ".join(f"{statistics.fmean(shares):.0%}" for shares in layers)


def _rows(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, Any]]]:
    """Return the table of a sweep, and its rows by variant and measure."""
    table = json.loads((folder / "table.json").read_text())
    return table, {(row["variant"], row["measure"]): row for row in table["rows"]}


def _kept(losses: dict[str, float], without: dict[str, float], everywhere: dict[str, float]) -> str:
    seeds = [seed for seed in losses if seed in without and seed in everywhere]
    if not seeds:
        return ""
    mean = [statistics.fmean(values[seed] for seed in seeds) for values in (losses, without, everywhere)]
    kept = (mean[1] - mean[0]) / (mean[1] - mean[2])
    if not -1 <= kept <= 2:
        return ""  # a variant of another norm has another scale
    each = [(without[seed] - losses[seed]) / (without[seed] - everywhere[seed]) for seed in seeds]
    return f"{kept:.0%}" + (f" ({min(each):.0%} to {max(each):.0%})" if len(each) > 1 else "")


def _spread(row: dict[str, Any]) -> str:
    return f"{row['mean']:.4f}" + ("" if row["deviation"] is None else f" ± {row['deviation']:.4f}")


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["low"] is None:
        return f"{found['mean']:+.4f}"
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def routing_table(folder: Path) -> Iterator[str]:
    """Yield the lines of a table with a row for each variant and layer: H beside noise, and regrets, over seeds.

    A regret is the mean over the seeds; behind it stands how many of them have it below 1 beyond their interval.
    """
    found: dict[tuple[str, int], dict[str, list[dict[str, str]]]] = {}
    for path in sorted(folder.glob("*/seed_*.routing.csv")):
        for line in csv.DictReader(path.read_text().splitlines()):
            if line["layer"]:
                measures = found.setdefault((path.parent.name, int(line["layer"])), {})
                measures.setdefault(line["measure"], []).append(line)
    predictors = list(dict.fromkeys(name for row in found.values() for name in row if name.startswith(_BY)))
    names = [name.removeprefix(_BY) for name in predictors]
    yield f"| variant | layer | H from noise | its own regret | {' | '.join(names)} |"
    yield "|---|---|---|---|" + "---|" * len(predictors)
    for (variant, layer), measures in found.items():
        distance = _mean(measures.get(NOISE, []))
        cells = [_regret(measures.get(name, [])) for name in (REGRET, *predictors)]
        yield f"| {variant} | {layer} | {distance:.3f} | " + " | ".join(cells) + " |"


def distance_table(folder: Path) -> Iterator[str]:
    """Yield the lines of a table with a row for each variant: right answers by distance, the mean over its seeds.

    Behind that of all distances stand the least and the most of one seed.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/seed_*.distance.json")):
        found.setdefault(path.parent.name, []).append(json.loads(path.read_text()))
    names = [f"{each['least']}-{each['most']}" for each in next(iter(found.values()))[0]["distances"]]
    yield f"| variant | seeds | {' | '.join(names)} | all |"
    yield "|---|---|" + "---|" * (len(names) + 1)
    for variant, records in found.items():
        columns = zip(*([*record["distances"], record] for record in records), strict=True)
        cells = [f"{statistics.fmean(each['accuracy'] for each in column):.1%}" for column in columns]
        accuracies = [record["accuracy"] for record in records]
        if len(records) > 1:
            cells[-1] += f" ({min(accuracies):.1%} to {max(accuracies):.1%})"
        yield f"| {variant} | {len(records)} | {' | '.join(cells)} |"


_BY = "regret of a router by "


def _mean(lines: list[dict[str, str]]) -> float:
    values = [float(line["value"]) for line in lines if line["value"]]
    return statistics.fmean(values) if values else math.nan


def _regret(lines: list[dict[str, str]]) -> str:
    known = [line for line in lines if line["value"]]
    if not known:
        return ""
    sure = sum(float(line["high"]) < 1 for line in known if line["high"])
    return f"{_mean(known):.2f} ({sure} of {len(known)})"
