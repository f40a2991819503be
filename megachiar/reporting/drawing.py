"""Matplotlib in one place: its import, one style whatever the user's own is, and files that hold no time."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megachiar.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Axes", "Figure", "Picture", "check_matplotlib", "draw", "legend_below", "new_figure", "style_of"]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#a66f00", "#7b3294", "#4d4d4d")
"""Colours that colour-blind readers can tell apart."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Kinds of lines, in turn: where two curves are equal, both can be seen."""
_DPI = 160
_LONGEST_LABEL = 44  # letters
_STYLE: Any = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # names and tokens may hold dollar signs
}


@dataclass(frozen=True)
class Picture:
    """A figure of a report.

    Attributes:
        name: of its files.
        title: in words.
        note: what a reader has to know to read it rightly.
        png: content of the file for the screen.
        pdf: content of the file for print.
    """

    name: str
    title: str
    note: str
    png: bytes
    pdf: bytes


def check_matplotlib() -> None:
    """Check that matplotlib can be imported.

    Raises:
        UserError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        remedy = "pip install -c constraints.txt -e '.[report]'"
        raise UserError("figures", f"need the package matplotlib: {remedy}", remedy) from None


def draw(name: str, title: str, note: str, function: Callable[[], Figure]) -> Picture:
    """Call ``function`` with our style and return its figure as PNG and PDF: the same bytes each time."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a token of any script; a box stands for it
        figure = function()
        png, pdf = io.BytesIO(), io.BytesIO()
        nothing: dict[str, Any] = {"Software": None}
        FigureCanvasAgg(figure).print_figure(png, format="png", dpi=_DPI, bbox_inches="tight", metadata=nothing)
        nothing = {"Creator": None, "Producer": None, "CreationDate": None}
        FigureCanvasPdf(figure).print_figure(pdf, format="pdf", bbox_inches="tight", metadata=nothing)
    return Picture(name, title, note, png.getvalue(), pdf.getvalue())


def new_figure(rows: int, columns: int, width: float, height: float, **settings: Any) -> tuple[Figure, Any]:
    """Return a figure of so many inches and its axes, an array (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def style_of(place: int) -> dict[str, Any]:
    """Return colour and kind of the line of the series number ``place``."""
    # A pair comes again after 8 colours with 4 kinds of lines only where the kinds move on with each round of colours.
    kind = DASHES[(place + place // len(COLOURS)) % len(DASHES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": kind}


def thousands(axis: Any, unit: str = "") -> None:
    """Let an axis write 20 k for 20,000."""
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(unit=unit, sep=" "))


def whole_numbers(axis: Any) -> None:
    """Let an axis have its ticks at whole numbers, which it writes with commas."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def legend_below(figure: Figure, names: Sequence[str], styles: Sequence[dict[str, Any]]) -> None:
    """Add one legend for all axes below them, in as many columns as have room."""
    from matplotlib.lines import Line2D

    shown = [shortened(name) for name in names]
    room = figure.get_size_inches()[0] * 72 / 5.5  # letters of the legend's font in one line
    columns = max(1, min(len(shown), int(room / (max(map(len, shown)) + 9))))
    lines = [Line2D([], [], **style) for style in styles]
    figure.legend(lines, shown, loc="outside lower center", ncols=columns)


def shortened(name: str, longest: int = _LONGEST_LABEL) -> str:
    """Return a name that fits a legend: a long one without its middle. One that begins with _ would be left out."""
    if len(name) > longest:
        name = f"{name[: longest // 3]}…{name[-(longest - longest // 3 - 1) :]}"
    return f" {name}" if name.startswith("_") else name


def colours_between(count: int) -> list[Any]:
    """Return so many colours from dark to light, in the order of a quantity."""
    import matplotlib

    scale = matplotlib.colormaps["viridis"]
    return [scale(0.9 * place / max(1, count - 1)) for place in range(count)]


def colour_bar(figure: Figure, axes: Axes, low: float, high: float, label: str) -> None:
    """Add the scale of ``colours_between`` beside the axes."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    shown = LinearSegmentedColormap.from_list("shown", colours_between(64))
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), shown), ax=axes, label=label)
    whole_numbers(bar.ax.yaxis)


def scale_of(colours: Sequence[str]) -> Any:
    """Return a scale of these colours alone, for whole numbers."""
    from matplotlib.colors import ListedColormap

    return ListedColormap(list(colours))


def patches(names: Sequence[str], colours: Sequence[str]) -> list[Any]:
    """Return an entry of a legend for each colour."""
    from matplotlib.patches import Patch

    return [Patch(color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
