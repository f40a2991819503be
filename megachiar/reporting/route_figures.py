"""The heatmap of a text: which operator each token takes in each layer, and by which spectral entropy H."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megachiar.analysis.text_routes import TextRoutes, operator_shares
from megachiar.reporting.drawing import new_figure, patches, scale_of, shortened
from megachiar.viewer.words import NAMES

if TYPE_CHECKING:
    from megachiar.reporting.drawing import Figure

MOST_TOKENS = 64
"""Tokens of a figure: more would not be readable; the CSV file has all."""
_COLOURS = {"attention": "#e8912d", "dct": "#3b78bd", "rbf": "#2f9270"}
_LONGEST_TOKEN = 14  # letters


def draw_heatmap(label: str, routes: TextRoutes) -> Figure:
    """Draw operators above and H below, layer 1 at the bottom of each, with the tokens along the axis."""
    trace, count = routes.trace, min(len(routes.tokens), MOST_TOKENS)
    layers = len(trace.routed)
    operator, entropy = trace.operator[:, 0, :count].numpy(), trace.entropy[:, 0, :count].double().numpy()
    row = 0.34 if layers <= 12 else 0.2
    figure, ((above,), (below,)) = new_figure(2, 1, max(6.0, 0.24 * count + 2.2), 2 * row * layers + 2.6, sharex=True)
    edges = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
    colours = [_COLOURS[name] for name in trace.operators]
    above.imshow(operator, cmap=scale_of(colours), vmin=-0.5, vmax=len(colours) - 0.5, **edges)
    above.set_title(f"Operators: {shortened(label, 60)}")
    shares = operator_shares(trace)[[n for n, routed in enumerate(trace.routed) if routed]].mean(0)
    names = [
        f"{NAMES[name]}, {100 * share:.0f} % in routed layers"
        for name, share in zip(trace.operators, shares, strict=True)
    ]
    figure.legend(handles=patches(names, colours), loc="outside upper right", ncols=len(names))
    picture = below.imshow(entropy, cmap="viridis", **edges)
    below.set_title("Spectral entropy H")
    figure.colorbar(picture, ax=below, pad=0.01, fraction=0.03)
    for axes in (above, below):
        axes.grid(False)
        axes.set_ylabel("layer")
        ticks = range(layers) if layers <= 12 else range(0, layers, 4)
        axes.set_yticks(list(ticks), [f"{n + 1}{'' if trace.routed[n] else ' (fixed)'}" for n in ticks])
        axes.set_xticks(np.arange(-0.5, count), minor=True)
        axes.set_yticks(np.arange(-0.5, layers), minor=True)
        axes.grid(True, which="minor", color="white", linewidth=0.7)
        axes.tick_params(which="minor", length=0)
    below.set_xticks(range(count), [visible(text.control or text.text) for text in routes.texts[:count]])
    below.tick_params(axis="x", rotation=90, labelsize=8)
    return figure


def visible(text: str) -> str:
    """Return a token as a label: white space has marks, and a long one is cut."""
    marked = text.replace("\n", "↵").replace("\t", "→")
    marked = "".join("·" if letter == " " else letter if letter.isprintable() else "□" for letter in marked)
    return marked if len(marked) <= _LONGEST_TOKEN else f"{marked[: _LONGEST_TOKEN - 1]}…"
