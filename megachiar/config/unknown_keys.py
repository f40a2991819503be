"""The answer to a key that no section has: the nearest one that it has."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from megachiar.config.errors import Problem

OwnKeys = dict[str, list[str]]
"""Last name of a key -> the dotted keys of that name."""


def unknown_key(path: tuple[str, ...], value: Any, known: Sequence[str], own: OwnKeys) -> Iterator[Problem]:
    """Yield what is to be said about the unknown key at ``path``.

    Args:
        path: the names from the top of the config to the key.
        value: what the config gives it.
        known: the keys that its section has.
        own: every key of a config by its last name.
    """
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    remedy = f"did you mean `{near[0]}`?" if near else "remove it."
    yield Problem(".".join(path), "is not a known key", f"{remedy} Known: {', '.join(known)}")
