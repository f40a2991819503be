"""Print the routes of a text: in colours on a terminal that has them, else with marks around the tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megachiar.viewer.words import NAMES, how_it_routes, notes

STYLES = {
    "dct": "white on #1d4e89",
    "rbf": "black on #5fbf95 underline",
    "attention": "bold black on #f2a33a underline",
}
MARKS = {"dct": ("", ""), "rbf": ("{", "}"), "attention": ("[", "]")}
"""What stands around a token where there are no colours."""


def print_routes(console: Console, record: dict[str, Any], layers: Sequence[int]) -> None:
    """Print the record of a text, see ``OpenRun.record``, with its tokens as they were routed in ``layers``.

    Args:
        console: to print to.
        record: of the text.
        layers: numbers of layers, from 1.
    """
    colours = console.is_terminal and not console.no_color
    parts: list[RenderableType] = [layer_table(record), class_table(record, layers[0])]
    for layer in layers:
        parts += [Text(), Text(f"layer {layer}, {how_it_routes(record, record['layers'][layer - 1])}", style="bold")]
        parts.append(coloured_text(record, layer, colours))
    console.print(Group(*parts, Text(), legend(record, colours)), markup=False, highlight=False)
    for note in [*notes(record), savings(record)]:
        console.print(note, style="dim", markup=False, highlight=False)


def layer_table(record: dict[str, Any]) -> Table:
    """Return a table of the layers: shares of the operators, and mean H beside that of white noise."""
    noise = record["noise"]
    title = f"{visible(record['run'])} at step {record['step']:,}: {len(record['tokens']):,} tokens"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("router")
    for name in record["operators"]:
        table.add_column(NAMES[name], justify="right")
    table.add_column("mean H", justify="right")
    table.add_column("sd", justify="right")
    for layer in record["layers"]:
        shares = [f"{layer['shares'][name]:.0%}" for name in record["operators"]]
        entropy = f"{layer['entropy_mean']:.4f}", f"{layer['entropy_deviation']:.4f}"
        table.add_row(str(layer["layer"]), how_it_routes(record, layer), *shares, *entropy)
    blank = [""] * len(record["operators"])
    table.add_row("", "white noise", *blank, f"{noise['mean']:.4f}", f"{noise['deviation']:.4f}")
    return table


def class_table(record: dict[str, Any], layer: int) -> Table:
    """Return a table of the classes of tokens in ``layer``, from 1."""
    table = Table(title=f"tokens by class, in layer {layer}", title_justify="left")
    table.add_column("class")
    table.add_column("tokens", justify="right")
    for name in record["operators"]:
        table.add_column(NAMES[name], justify="right")
    table.add_column("mean H", justify="right")
    for each in record["classes"]:
        shares = [f"{each['shares'][layer - 1][name]:.0%}" for name in record["operators"]]
        table.add_row(each["class"], f"{each['tokens']:,}", *shares, f"{each['entropy_mean'][layer - 1]:.4f}")
    return table


def coloured_text(record: dict[str, Any], layer: int, colours: bool) -> Text:
    """Return the text with each token in the colour, or the marks, of its operator in ``layer``, from 1."""
    text = Text()
    for token in record["tokens"]:
        operator = record["operators"][token["operator"][layer - 1]]
        shown = visible(token["text"]) if token["control"] is None else f"<{visible(token['control'])}>"
        line_breaks = "\n" * shown.count("\n")
        if colours:
            text.append(shown.replace("\n", "⏎"), style=STYLES[operator])
        else:
            text.append(marked(shown.replace("\n", "⏎") or "·", operator))
        text.append(line_breaks)
    text.rstrip()
    return text


def marked(shown: str, operator: str) -> str:
    """Return a token with the marks of its operator, which stand behind the space that leads it."""
    left, right = MARKS[operator]
    bare = shown.lstrip(" ") or shown
    return f"{shown[: len(shown) - len(bare)]}{left}{bare}{right}"


def legend(record: dict[str, Any], colours: bool) -> Text:
    """Return what the colours or the marks mean."""
    text = Text()
    for name in record["operators"]:
        left, right = MARKS[name]
        if colours:
            text.append(f" {NAMES[name]} ", style=STYLES[name])
            text.append("  ")
        else:
            text.append(f"{left}{NAMES[name]}{right}   ")
    return text


def savings(record: dict[str, Any]) -> str:
    """Return what the routes save, or cost, against attention everywhere."""
    saved = record["flops_saved"]
    words = [f"{abs(saved[part]):.1%} {'fewer' if saved[part] >= 0 else 'more'}" for part in ("operators", "model")]
    return f"Against attention everywhere: {words[0]} FLOPs in the operators, {words[1]} in the model."


def visible(text: str) -> str:
    """Return ``text`` with a visible sign for each character that could steer a terminal; line feeds stay."""
    return "".join(_sign(letter) for letter in text)


def _sign(letter: str) -> str:
    code = ord(letter)
    if letter == "\n":
        return letter
    if code < 0x20:
        return chr(0x2400 + code)  # such as ␉ for a tab
    if code == 0x7F:
        return "\u2421"
    return "\ufffd" if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") else letter
