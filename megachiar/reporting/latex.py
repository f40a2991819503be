r"""Write tables as LaTeX with booktabs, in characters that every engine sets.

    \usepackage{booktabs}
    \input{tables/main.tex}

Letters with accents become LaTeX's own commands. A character for which LaTeX has none without another package is
written by its number, such as U+4E2D: a table that does not compile would be worse.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from megachiar.reporting.table import Table

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",  # \\textquotedbl needs the encoding T1
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": r"$-$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "œ": r"\oe{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
    "ı": r"\i{}",
    "£": r"\pounds{}",
    "§": r"\S{}",
    "\u00a0": "~",
}
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0327": "c",
}
_WIDEST_TEXT_CM = 14  # that columns of long texts share
_WIDEST_COLUMN_CM = 6


def escaped(content: str) -> str:
    """Return ``content`` as LaTeX sets it, on one line."""
    return "".join(_character(letter) for letter in " ".join(content.split()))


def _character(letter: str) -> str:
    if letter in _SPECIAL:
        return _SPECIAL[letter]
    if " " <= letter <= "~":
        return letter
    base, *accents = list(unicodedata.normalize("NFD", letter))
    if len(accents) == 1 and accents[0] in _ACCENTS and base.isascii() and base.isalpha():
        return f"\\{_ACCENTS[accents[0]]}{{{base}}}"
    return f"\\texttt{{U+{ord(letter):04X}}}"


def as_latex(table: Table) -> str:
    """Return a table environment, to be read by ``\\input`` in a document that uses booktabs."""
    columns, rows = table.shown()
    long = [column.is_text and max(len(row[n]) for row in rows) > 40 for n, column in enumerate(columns)]
    width = min(_WIDEST_TEXT_CM / max(1, sum(long)), _WIDEST_COLUMN_CM)
    layout = "".join(
        f"p{{{width:.1f}cm}}" if is_long else "l" if column.is_text else "r"
        for column, is_long in zip(columns, long, strict=True)
    )
    caption = f"{escaped(table.title)}." + (f" {escaped(table.note)}" if table.note else "")
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}[t]",
        r"\centering\small",
        f"\\caption{{{caption}}}",
        f"\\label{{tab:{table.name.replace('_', '-')}}}",
        f"\\begin{{tabular}}{{{layout}}}",
        r"\toprule",
        _line([column.heading for column in columns]),
        r"\midrule",
        *(_line(row) for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    # A bracket that opens a row would be read as the argument of the \\ before it.
    return " & ".join(f"{{}}{escaped(cell)}" if cell[:1] in "[*" else escaped(cell) for cell in cells) + r" \\"


def document(names: Sequence[str]) -> str:
    """Return a whole document with the tables of these names, to compile beside them."""
    inputs = [f"\\input{{{name}.tex}}" for name in names]
    lines = [
        r"\documentclass{article}",
        r"\usepackage{booktabs}",
        r"\usepackage[a3paper,landscape,margin=15mm]{geometry}",
        r"\begin{document}",
        *inputs,
        r"\end{document}",
    ]
    return "\n".join(lines) + "\n"
