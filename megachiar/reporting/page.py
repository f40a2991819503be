"""Write the page of a report: one HTML file with tables and figures, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from importlib.resources import files

from megachiar.reporting.drawing import Picture
from megachiar.reporting.table import Table
from megachiar.viewer.page import base_style, source_of

_UNSHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # no characters of HTML

_SCALE = 0.75  # pixels of a page for one of a figure, so that all figures have letters of one size


def report_page(tables: Sequence[Table], pictures: Sequence[Picture], notes: Sequence[str]) -> str:
    """Return the page.

    Args:
        tables: in order.
        pictures: in order.
        notes: what is left out.
    """
    style = base_style() + (files("megachiar.reporting") / "page.css").read_text("utf-8")
    policy = f"default-src 'none'; img-src data:; style-src {source_of(style)}; base-uri 'none'; form-action 'none'"
    links = [(table.name, table.title) for table in tables] + [(f"fig-{p.name}", p.title) for p in pictures]
    links += [("left-out", "Left out")] if notes else []
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="generator" content="megachiar report">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<title>megachiar report</title>",
        f"<style>{style}</style>",
        "</head>",
        "<body>",
        "<h1>Report of runs</h1>",
        "<nav>" + " ".join(f'<a href="#{name}">{shown(title)}</a>' for name, title in links) + "</nav>",
        *map(_table, tables),
        *map(_picture, pictures),
        *([_notes(notes)] if notes else []),
        "</body>",
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def shown(content: str) -> str:
    """Return any text as HTML has it."""
    return html.escape(_UNSHOWN.sub("\ufffd", content))


def _table(table: Table) -> str:
    columns, rows = table.shown()
    kinds = ["text" if column.is_text else "number" for column in columns]
    heads = "".join(f'<th class="{kind}">{shown(c.heading)}</th>' for kind, c in zip(kinds, columns, strict=True))
    lines = [
        "<tr>"
        + "".join(f'<td class="{kind}">{shown(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    ]
    note = f'<p class="note">{shown(table.note)}</p>' if table.note else ""
    return (
        f'<section id="{table.name}"><h2>{shown(table.title)}</h2>{note}\n<div class="wide"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div></section>"
    )


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    width = round(_SCALE * int.from_bytes(picture.png[16:20], "big"))  # as the first chunk of a PNG file has it
    note = f'<p class="note">{shown(picture.note)}</p>' if picture.note else ""
    return (
        f'<section id="fig-{picture.name}"><h2>{shown(picture.title)}</h2>{note}\n'
        f'<div class="wide"><img alt="{shown(picture.title)}" width="{width}" src="data:image/png;base64,{data}"></div>'
        "</section>"
    )


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f"<li>{shown(note)}</li>" for note in notes)
    return f'<section id="left-out"><h2>Left out</h2><ul>{lines}</ul></section>'
