"""Figures of curves over training: losses, accuracy, learning rate, gate, attention shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megachiar.reporting.drawing import (
    colour_bar,
    colours_between,
    legend_below,
    new_figure,
    shortened,
    style_of,
    thousands,
    whole_numbers,
)
from megachiar.reporting.history import Curve, against_tokens, curve, layer_curves
from megachiar.reporting.reported_run import ReportedRun

if TYPE_CHECKING:
    from megachiar.reporting.drawing import Axes, Figure

_BINS = 40  # of the gate's histogram
_LAYERS_WITH_NAMES = 8  # more are shown by a bar of colours
_FEW = 30  # points, which are marked


class Panel:
    """One pair of axes of a figure of curves.

    Attributes:
        title: what is shown.
        x: what it is shown against: ``step`` or ``tokens``.
        curves: by the label of the run; those without points are left out.
    """

    def __init__(self, title: str, x: str, curves: Mapping[str, Curve | None]):
        self.title, self.x = title, x
        self.curves = {label: found for label, found in curves.items() if found is not None and found.x}


def training_panels(runs: Sequence[ReportedRun], value: str, title: str) -> list[list[Panel]]:
    """Return rows of panels: ``value`` in training and on the main validation set, against steps and tokens."""
    training = {run.label: curve(run.records, "train", value) for run in runs}
    held_out = {run.label: _on_validation(run, value) for run in runs}
    rows = []
    for name, curves in (("Training", training), ("Validation", held_out)):
        steps = Panel(f"{name} {title}", "step", curves)
        tokens = {run.label: against_tokens(curves[run.label], run.records) for run in runs}
        panels = [steps, Panel(f"{name} {title}", "tokens", tokens)]
        rows.append([panel for panel in panels if panel.curves])
    return [row for row in rows if row]


def _on_validation(run: ReportedRun, value: str) -> Curve:
    names = run.main_sets[:1]
    return curve(run.records, f"evaluation/{names[0]}", value) if names else Curve([], [])


def draw_panels(rows: Sequence[Sequence[Panel]], runs: Sequence[ReportedRun], y: str) -> Figure:
    """Draw rows of panels with one legend. Runs of a variant have one colour and one entry."""
    columns = max(map(len, rows))
    figure, grid = new_figure(len(rows), columns, 5.2 * columns, 3.1 * len(rows) + 0.3)
    styles = styles_of(runs)
    shown: dict[str, dict[str, Any]] = {}
    for row, axes_of_row in zip(rows, grid, strict=True):
        for axes in axes_of_row[len(row) :]:
            axes.set_visible(False)
        for panel, axes in zip(row, axes_of_row, strict=False):
            for run in runs:
                if (found := panel.curves.get(run.label)) is not None:
                    style = styles[run.name.variant]
                    axes.plot(found.x, found.y, **style, **marks(found.x))
                    shown[run.name.variant] = style
            _finish(axes, panel, y)
    legend_below(figure, list(shown), list(shown.values()))
    return figure


def _finish(axes: Axes, panel: Panel, y: str) -> None:
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x)
    axes.set_ylabel(y)
    if panel.x == "step":
        whole_numbers(axes.xaxis)
    else:
        thousands(axes.xaxis)


def styles_of(runs: Sequence[ReportedRun]) -> dict[str, dict[str, Any]]:
    """Return the style of each variant, the same in all figures of a report."""
    variants = list(dict.fromkeys(run.name.variant for run in runs))
    return {variant: style_of(place) for place, variant in enumerate(variants)}


def learning_rates(runs: Sequence[ReportedRun]) -> list[list[Panel]]:
    """Return the panel of learning rates; nothing where no run has recorded any."""
    panel = Panel("Learning rate", "step", {run.label: curve(run.records, "train", "learning_rate") for run in runs})
    return [[panel]] if panel.curves else []


class GateCurve(NamedTuple):
    """The gate g of a run, or of one task of a mixed run.

    Attributes:
        name: in the legend: that of the variant, and of a mixed run's task.
        curve: of finite values.
    """

    name: str
    curve: Curve


def gates(runs: Sequence[ReportedRun]) -> list[GateCurve]:
    """Return the gate of the MetaRouter of each run that has logged one, and of a mixed run by task."""
    found = []
    for run in runs:
        names = {"gate": run.name.variant}
        if run.config is not None and run.config.mixed.tasks:
            names = {"gate": f"{run.name.variant}, main task"}
            names |= {f"{task}/gate": f"{run.name.variant}, {task}" for task in run.config.mixed.tasks}
        for key, name in names.items():
            points = curve(run.records, "train", key)
            known = [place for place, value in enumerate(points.y) if np.isfinite(value)]
            if known:
                finite = Curve([points.x[place] for place in known], [points.y[place] for place in known])
                found.append(GateCurve(name, finite))
    return found


def draw_gates(curves: Sequence[GateCurve]) -> Figure:
    """Draw gates over steps, and beside them how often each value was logged."""
    settings = {"sharey": True, "gridspec_kw": {"width_ratios": [3, 1]}}
    figure, ((over_steps, counts),) = new_figure(1, 2, 8.6, 3.6, **settings)
    values = np.concatenate([found.curve.y for found in curves])
    margin = max(0.02, 0.08 * float(values.max() - values.min()))
    limits = (max(0.0, float(values.min()) - margin), min(1.0, float(values.max()) + margin))
    styles = {name: style_of(place) for place, name in enumerate(dict.fromkeys(found.name for found in curves))}
    for name, (x, y) in curves:
        over_steps.plot(x, y, **styles[name], **marks(x))
    for name, style in styles.items():
        of_name = [value for found in curves if found.name == name for value in found.curve.y]
        bars = {"bins": _BINS, "range": limits, "orientation": "horizontal", "histtype": "stepfilled", "alpha": 0.35}
        counts.hist(of_name, color=style["color"], **bars)
    over_steps.set_ylim(*limits)
    over_steps.set_title("Gate of the MetaRouter")
    over_steps.set_xlabel("step")
    over_steps.set_ylabel("mean g (1: DCT mixing, 0: bypass)")
    counts.set_title("Its distribution")
    counts.set_xlabel("records")
    for axis in (over_steps.xaxis, counts.xaxis):
        whole_numbers(axis)
    legend_below(figure, list(styles), list(styles.values()))
    return figure


def marks(x: Sequence[float]) -> dict[str, Any]:
    """Return the settings that mark the points of a curve of few points."""
    return {"marker": "o", "markersize": 3} if len(x) < _FEW else {}


def routed_shares(run: ReportedRun) -> dict[int, Curve]:
    """Return the attention share of each routed layer, by its number from 1; nothing where they are not logged."""
    layers = layer_curves(run.records, "attention_share")
    if run.config is None or len(layers) != run.config.model.num_layers:
        return {}
    return {layer + 1: layers[layer] for layer in run.config.model.routed_layers}


def draw_shares(label: str, shares: Mapping[int, Curve]) -> Figure:
    """Draw the attention share of each routed layer over steps: dark lines are early layers."""
    figure, ((axes,),) = new_figure(1, 1, 6.4, 3.4)
    colours = colours_between(len(shares))
    for (layer, found), colour in zip(shares.items(), colours, strict=True):
        axes.plot(found.x, found.y, color=colour, label=f"layer {layer}", **marks(found.x))
    axes.set_ylim(-0.03, 1.03)
    axes.set_title(f"Attention share: {shortened(label, 60)}")
    axes.set_xlabel("step")
    axes.set_ylabel("share of tokens")
    whole_numbers(axes.xaxis)
    if len(shares) <= _LAYERS_WITH_NAMES:
        figure.legend(loc="outside right center")
    else:
        colour_bar(figure, axes, min(shares), max(shares), "layer")
    return figure
