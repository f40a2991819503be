"""The results of a comparison as points with error bars: each variant, and its paired difference from the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megachiar.reporting.ablation import MEASURES, SURE, Ablation
from megachiar.reporting.drawing import COLOURS, new_figure, shortened

if TYPE_CHECKING:
    from megachiar.reporting.drawing import Axes, Figure

_GRAY = "#8a8a8a"


def draw_ablation(ablation: Ablation) -> Figure:
    """Draw a row of two panels for each compared measure: values by seed with mean ± sd, and differences."""
    measures = ablation.compared()
    variants = list(ablation.effects)
    height = 0.3 * len(variants) + 1.1
    figure, grid = new_figure(len(measures), 2, 9.4, height * len(measures), sharey=True)
    for measure, (values, differences) in zip(measures, grid, strict=True):
        for place, variant in enumerate(variants):
            effect = ablation.effects[variant].get(measure)
            if effect is None:
                continue
            seeds = list(effect.values.values())
            values.plot(seeds, [place] * len(seeds), linestyle="", marker="|", markersize=9, color=_GRAY)
            values.errorbar(
                effect.spread.mean, place, xerr=effect.spread.deviation, fmt="o", color=COLOURS[0], capsize=3
            )
            if (difference := effect.difference) is not None:
                reach = None if difference.low is None else difference.mean - difference.low
                differences.errorbar(difference.mean, place, xerr=reach, fmt="o", color=COLOURS[1], capsize=3)
        differences.axvline(0, color=_GRAY, linewidth=1)
        heading = MEASURES[measure][0]
        values.set_title(f"{heading}: mean ± sd, and each seed")
        differences.set_title(f"minus {shortened(ablation.reference, 30)}, {SURE}")
        _name_rows(values, variants)
        for axes in (values, differences):
            axes.locator_params(axis="x", nbins=6)
            axes.grid(False, axis="y")
    return figure


def _name_rows(axes: Axes, variants: list[str]) -> None:
    axes.set_yticks(range(len(variants)), [shortened(variant, 32) for variant in variants])
    axes.set_ylim(len(variants) - 0.5, -0.5)
