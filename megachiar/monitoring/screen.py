"""What the terminal shows of runs: a panel for each, side by side, or one line for each where there is no room."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megachiar.monitoring.braille import Line, bars, plot
from megachiar.monitoring.one_line import one_line
from megachiar.monitoring.run_state import duration
from megachiar.monitoring.watched_run import WatchedRun
from megachiar.training.metrics import EVALUATION, TRAIN

STATE_STYLES = {
    "running": "bold green",
    "starting": "green",
    "finished": "bold cyan",
    "stopped": "bold yellow",
    "silent": "bold yellow",
    "failed": "bold red",
    "killed": "bold red",
}
TRAIN_STYLE, VALIDATION_STYLE = "cyan", "bold magenta"
_NARROWEST, _LOWEST = 36, 12  # a panel in characters
_HIGHEST_PLOT = 18
_LABEL = 10  # characters before bars
_HUGE = 1e9  # a number that is written with an exponent


class Size(NamedTuple):
    """Room for a frame, in characters, and whether it may hold ASCII alone."""

    width: int
    height: int
    ascii_only: bool = False


def frame(runs: Sequence[WatchedRun], size: Size, footer: str = "") -> RenderableType:
    """Return what the terminal shows: at most ``size.height`` lines."""
    room = size.height - (1 if footer else 0)
    columns = min(len(runs), max(1, size.width // _NARROWEST))
    rows = math.ceil(len(runs) / columns)
    columns = math.ceil(len(runs) / rows)
    below = [Text(footer, style="dim", no_wrap=True, overflow="ellipsis")] if footer else []
    if size.width < _NARROWEST or room // rows < _LOWEST:
        return Group(overview(runs, Size(size.width, room, size.ascii_only)), *below)
    parts: list[RenderableType] = []
    for row in range(rows):
        grid = Table.grid(padding=0)
        shown = runs[row * columns : (row + 1) * columns]
        widths = [size.width // columns + (place < size.width % columns) for place in range(columns)]
        height = room // rows + (row < room % rows)
        for width in widths[: len(shown)]:
            grid.add_column(width=width)
        grid.add_row(
            *(panel(run, Size(width, height, size.ascii_only)) for run, width in zip(shown, widths, strict=False))
        )
        parts.append(grid)
    return Group(*parts, *below)


def panel(run: WatchedRun, size: Size) -> Panel:
    """Return the panel of a run."""
    inner = Size(size.width - 4, size.height - 2, size.ascii_only)
    body = Group(*panel_lines(run, inner))
    title = Text(one_line(run.name), style="bold", no_wrap=True, overflow="ellipsis")
    return Panel(body, title=title, title_align="left", box=ROUNDED, width=size.width, height=size.height)


def panel_lines(run: WatchedRun, size: Size) -> list[Text]:
    """Return at most ``size.height`` lines about a run; what matters less is left out first."""
    head = [*state_lines(run, size.width, size.ascii_only), *wrapped(facts(run), size.width)][: size.height]
    left = size.height - len(head)
    events = event_lines(run, size.width, max(0, min(6, left // 3)))
    layers = layer_lines(run, size) if left >= 10 else []
    room = min(_HIGHEST_PLOT, left - len(events) - len(layers))
    curves = loss_plot(run, size.width, room, size.ascii_only)
    more = left - len(curves) - len(layers) - len(events)
    if more > 0 and events:
        events = event_lines(run, size.width, len(events) + more)
    return [*head, *curves, *layers, *events]


def state_lines(run: WatchedRun, width: int, ascii_only: bool = False) -> Iterator[Text]:
    """Yield the state, how far the run is, and a bar."""
    state = Text(run.state.word, style=STATE_STYLES.get(run.state.word, "bold"))
    steps = f"/{run.steps:,}" if run.steps is not None else ""
    lives = run.state.word in ("running", "silent")
    left = f"  {duration(run.seconds_left)} left" if lives and run.seconds_left is not None else ""
    yield state + Text(f"  step {run.step:,}{steps}{left}", style="default")
    if run.state.detail:
        detail = Text(one_line(run.state.detail), style="dim", no_wrap=True, overflow="ellipsis")
        detail.truncate(width, overflow="ellipsis")
        yield detail
    if run.steps is not None:
        share = min(1.0, run.step / run.steps)
        full = round(share * (width - 6))
        done, to_do = ("=", "-") if ascii_only else ("━", "━")
        yield Text.assemble((done * full, "green"), (to_do * (width - 6 - full), "dim"), f" {share:4.0%}")


def facts(run: WatchedRun) -> list[Text]:
    """Return the numbers of the newest records, each as a text that is not broken."""
    latest, history = run.history.latest, run.history
    found: list[tuple[str, float | None, str, str]] = [("loss", history.newest_loss, ".4f", TRAIN_STYLE)]
    for name in history.sets:
        for value in ("loss", "accuracy"):
            label = one_line(name) if value == "loss" else f"{one_line(name)} {value}"
            found.append((label, history.newest(f"{EVALUATION}{name}", value), ".4f", VALIDATION_STYLE))
    norm = history.newest(TRAIN, "gradient_norm")
    found += [("lr", latest("learning_rate"), ".2e", ""), ("grad", norm, ".3f", "")]
    shown = [_fact(name, value, form, style) for name, value, form, style in found if value is not None]
    if (rate := latest("tokens_per_second")) is not None:
        shown.append(Text.assemble(f"{rate:,.0f}", (" tok/s", "dim")))
    if (share := latest("model_flops_utilisation")) is not None:
        shown.append(Text.assemble(("MFU ", "dim"), f"{share:.1%}"))
    if (seconds := run.seconds_per_step) is not None:
        shown.append(Text.assemble(f"{seconds:.3g}", (" s/step", "dim")))
    share, entropy = run.mean_of_routed("attention_share"), run.mean_of_routed("entropy")
    more = (("g", latest("gate"), ".3f"), ("attention", share, ".0%"), ("H", entropy, ".4f"))
    shown += [_fact(name, value, form) for name, value, form in more if value is not None]
    if history.damaged:
        shown.append(Text(f"{history.damaged} damaged lines", style="yellow"))
    return shown


def _fact(name: str, value: float, form: str, style: str = "") -> Text:
    return Text.assemble((f"{name} ", "dim"), _number(value, form, style))


def wrapped(pieces: Sequence[Text], width: int) -> list[Text]:
    """Return the pieces in lines of at most ``width``, two spaces between them."""
    lines: list[Text] = []
    for piece in pieces:
        if lines and lines[-1].cell_len + 2 + piece.cell_len <= width:
            lines[-1] = lines[-1] + Text("  ") + piece
        else:
            piece.truncate(width, overflow="ellipsis")
            lines.append(piece)
    return lines


def loss_plot(run: WatchedRun, width: int, height: int, ascii_only: bool) -> list[Text]:
    """Return the curves of training and validation loss; nothing where there is no room."""
    lines, train = [], run.history.losses
    if train.steps:
        lines.append(Line(train.steps, train.values, TRAIN_STYLE))
    for name in run.history.sets[:1]:
        held_out = run.history.curve(f"{EVALUATION}{name}", "loss")
        lines.append(Line(held_out.steps, held_out.values, VALIDATION_STYLE, joined=False))
    return plot(lines, width, height, ascii_only)


def layer_lines(run: WatchedRun, size: Size) -> list[Text]:
    """Return a line of bars, one for each layer, of attention's share and of H, and one of the throughput."""
    lines = []
    for name, label, form in (("attention_share", "attention", ".0%"), ("entropy", "H", ".3f")):
        rows = run.history.layers.get(name)
        known = [value for value in rows.rows[-1] if value is not None] if rows is not None and rows.rows else []
        if rows is None or not known:
            continue
        low, high = (0.0, 1.0) if name == "attention_share" else (min(known), max(known))
        note = f" {min(known):{form}}..{max(known):{form}} by layer"
        drawn = bars(rows.rows[-1], low, high, size.width - _LABEL - len(note), size.ascii_only)
        lines.append(_bar_line(label, drawn, note))
    rates = run.history.curve(TRAIN, "tokens_per_second").values
    if len(rates) > 1:
        note = f" {min(rates):,.0f}..{max(rates):,.0f}"
        drawn = bars(rates, 0.0, max(rates), size.width - _LABEL - len(note), size.ascii_only)
        lines.append(_bar_line("tok/s", drawn, note))
    return lines


def _bar_line(label: str, drawn: str, note: str) -> Text:
    return Text.assemble((f"{label:<9} ", "dim"), (drawn, "yellow"), (note, "dim"))


def event_lines(run: WatchedRun, width: int, most: int) -> list[Text]:
    """Return the newest ``most`` happenings, the newest last."""
    lines = []
    for happening in run.happenings[-most:] if most else []:
        line = Text(f"{happening.clock} ".lstrip(), style="dim") + Text(
            one_line(happening.text), style="yellow" if happening.is_alarming else "default"
        )
        line.truncate(width, overflow="ellipsis")
        lines.append(line)
    return lines


def overview(runs: Sequence[WatchedRun], size: Size) -> RenderableType:
    """Return a table with a line for each run, with as many columns as there is room for."""
    columns = {"state": 8, "step": 15, "loss": 7, "val": 7, "tok/s": 9, "left": 7}
    name_width = min(24, max(len("run"), *(len(run.name) for run in runs)), max(6, size.width - 10))
    kept, used = [], name_width
    for name, width in columns.items():
        if used + 1 + width > size.width:
            break
        kept.append(name)
        used += 1 + width
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=name_width, no_wrap=True, overflow="ellipsis")
    for name in kept:
        right = "left" if name == "state" else "right"
        table.add_column(width=columns[name], no_wrap=True, overflow="ellipsis", justify=right)  # type: ignore[arg-type]
    table.add_row(*(Text(heading, style="dim") for heading in ("run", *kept)))
    shown = runs[: max(1, size.height - 1)] if len(runs) < size.height else runs[: max(1, size.height - 2)]
    for run in shown:
        table.add_row(Text(one_line(run.name)), *(_cell(run, name) for name in kept))
    if len(shown) < len(runs):
        return Group(table, Text(f"and {len(runs) - len(shown)} more", style="dim"))
    return table


def _cell(run: WatchedRun, column: str) -> Text:
    history = run.history
    if column == "state":
        return Text(run.state.word, style=STATE_STYLES.get(run.state.word, ""))
    if column == "step":
        return Text(f"{run.step:,}" + (f"/{run.steps:,}" if run.steps is not None else ""))
    if column == "loss":
        return _number(history.newest_loss, ".4f")
    if column == "val":
        losses = [history.newest(f"{EVALUATION}{name}", "loss") for name in history.sets[:1]]
        return _number(losses[0] if losses else None, ".4f")
    if column == "tok/s":
        return _number(history.latest("tokens_per_second"), ",.0f")
    lives = run.state.word in ("running", "silent")
    return Text(duration(run.seconds_left) if lives and run.seconds_left is not None else "")


def _number(value: float | None, form: str, style: str = "") -> Text:
    """Return a number as ``form`` writes it: in red where it is not finite, and with an exponent where it is huge."""
    if value is None:
        return Text("")
    is_huge = abs(value) >= _HUGE and form.endswith("f")
    return Text(format(value, ".3e" if is_huge else form), style=style if math.isfinite(value) else "bold red")


def footer(every: float) -> str:
    """Return the last line of a live view."""
    return f"q ends the view, not the runs   every {every:g} s   {time.strftime('%H:%M:%S')}"
