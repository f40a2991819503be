"""Texts of a run's files on a terminal: one line each, and nothing in them that a terminal would obey."""

from __future__ import annotations

UNSHOWN = "\ufffd"
"""What stands for a character that has no look of its own."""


def one_line(text: str) -> str:
    """Return ``text`` without line breaks, escape sequences and marks of direction.

    A reason that a run failed for, or the name of a validation set, may hold any character. A terminal would clear its
    screen, name its window or fill the clipboard as such a text says.
    """
    return "".join(_shown(letter) for letter in text)


def _shown(letter: str) -> str:
    if letter.isprintable():
        return letter
    return " " if letter.isspace() else UNSHOWN
