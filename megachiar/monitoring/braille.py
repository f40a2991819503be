"""Plots of characters: curves of braille dots, two by four in a character, and bars of blocks.

Where the terminal has no such characters, ``*`` and signs of ASCII stand for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column of a character
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"


@dataclass(frozen=True)
class Line:
    """A curve of a plot.

    Attributes:
        x, y: its points by rising x, as many of one as of the other, finite.
        style: of rich, such as ``cyan``.
        joined: whether its points are joined by lines.
    """

    x: Sequence[float]
    y: Sequence[float]
    style: str
    joined: bool = True


class Canvas:
    """Dots that curves are drawn with; the last one drawn gives a character its colour.

    Args:
        width, height: in characters.
        ascii_only: whether there are no braille characters.
    """

    def __init__(self, width: int, height: int, ascii_only: bool = False):
        self.width, self.height, self._ascii = width, height, ascii_only
        self._bits = [[0] * width for _ in range(height)]
        self._styles = [[""] * width for _ in range(height)]

    def dot(self, column: int, row: int, style: str) -> None:
        """Set a dot; columns count from the left and rows from the top."""
        across, down = column // 2, row // 4
        if 0 <= across < self.width and 0 <= down < self.height:
            self._bits[down][across] |= _DOTS[row % 4][column % 2]
            self._styles[down][across] = style

    def line(self, start: tuple[int, int], end: tuple[int, int], style: str) -> None:
        """Set the dots of a straight line."""
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for part in range(length + 1):
            column, row = (round(a + (b - a) * part / length) for a, b in zip(start, end, strict=True))
            self.dot(column, row, style)

    def rows(self) -> list[Text]:
        """Return the lines of the canvas."""
        found = []
        for bits, styles in zip(self._bits, self._styles, strict=True):
            text = Text()
            for bit, style in zip(bits, styles, strict=True):
                sign = ("*" if bit else " ") if self._ascii else chr(0x2800 + bit) if bit else " "
                text.append(sign, style=style)
            found.append(text)
        return found


def plot(lines: Sequence[Line], width: int, height: int, ascii_only: bool = False) -> list[Text]:
    """Return a plot of ``height`` lines: numbers of the y axis at the left, and below the first and last x.

    Returns nothing where there is no point, or no room.
    """
    shown = [line for line in lines if line.x]
    if not shown or height < 3:
        return []
    low, high = _range([value for line in shown for value in line.y])
    labels = [f"{value:.4g}" for value in (high, (low + high) / 2, low)]
    margin = max(map(len, labels)) + 1
    if width < margin + 8:
        return []
    left, right = min(line.x[0] for line in shown), max(line.x[-1] for line in shown)
    canvas = Canvas(width - margin, height - 1, ascii_only)
    columns, rows = 2 * canvas.width - 1, 4 * canvas.height - 1

    def place(x: float, y: float) -> tuple[int, int]:
        across = (x - left) / (right - left) if right > left else 0.5
        return round(across * columns), round((high - y) / (high - low) * rows)

    for line in shown:
        places = [place(x, y) for x, y in zip(line.x, line.y, strict=True)]
        for start, end in zip(places, places[1:] if line.joined else [], strict=False):
            canvas.line(start, end, line.style)
        for column, row in places:
            canvas.dot(column, row, line.style)
            if not line.joined:  # a point by itself is drawn larger
                canvas.dot(column, row + 1, line.style)
    at = {canvas.height // 2: labels[1], 0: labels[0], canvas.height - 1: labels[2]}  # the ends come last: they stay
    drawn = [Text(f"{at.get(row, ''):>{margin - 1}} ", style="dim") + text for row, text in enumerate(canvas.rows())]
    first, last = f"{left:,.0f}", f"step {right:,.0f}"
    return [*drawn, Text(" " * margin + first + last.rjust(max(0, width - margin - len(first))), style="dim")]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high > low:
        return low, high
    return low - max(abs(low), 1e-9) * 0.05, high + max(abs(high), 1e-9) * 0.05


def bars(values: Sequence[float | None], low: float, high: float, most: int, ascii_only: bool = False) -> str:
    """Return a block for each value, between ``low`` and ``high``; of more than ``most`` the means of neighbours.

    A value that is missing is a dot.
    """
    signs = ASCII_BLOCKS if ascii_only else BLOCKS
    count = min(len(values), max(0, most))
    parts = [values[part * len(values) // count : (part + 1) * len(values) // count] for part in range(count)]
    shown = ""
    for part in parts:
        known = [value for value in part if value is not None and math.isfinite(value)]
        if not known:
            shown += "."
            continue
        share = (sum(known) / len(known) - low) / (high - low) if high > low else 0.5
        shown += signs[min(len(signs) - 1, max(0, round(share * (len(signs) - 1))))]
    return shown
