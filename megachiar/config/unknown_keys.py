"""The answer to a key that no section has: another stack's word, a key of another section, or a slip of the pen."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

from megachiar.config.errors import Problem
from megachiar.config.foreign_keys import ForeignKey, foreign_key, normalized

ConfigKeys = dict[str, list[str]]
"""Last name of a key -> the dotted keys of that name."""


def unknown_key(path: tuple[str, ...], value: Any, known: Sequence[str], config_keys: ConfigKeys) -> Iterator[Problem]:
    """Yield the problem of the unknown key at ``path``, or those of the keys below it that have an answer.

    Args:
        path: the names from the top of the config to the key.
        value: its value in the config.
        known: the keys that its section has.
        config_keys: every key of a config by its last name.
    """
    row = foreign_key(path)
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    if near and isinstance(value, dict) and value and _are_keys_of((*path[:-1], near[0]), value, config_keys):
        yield _misspelt(path, near, known)
    elif isinstance(value, dict) and any(
        _has_answer((*path, str(name)), inner, config_keys) for name, inner in value.items()
    ):
        yield from _below(path, value, row, config_keys)
    elif row is not None:
        yield _another_stack(path, row)
    elif (name := normalized(path[-1])) in config_keys:
        keys = " or ".join(f"`{key}`" for key in config_keys[name])
        yield Problem(".".join(path), "is not a known key at this place", f"use {keys}")
    else:
        yield _misspelt(path, near, known)


def _below(
    path: tuple[str, ...], value: dict[str, Any], row: ForeignKey | None, config_keys: ConfigKeys
) -> Iterator[Problem]:
    """Answer key by key; those without an answer are left to that of the whole, where it has one."""
    without = False
    for name, inner in value.items():
        inside = (*path, str(name))
        if row is None or _has_answer(inside, inner, config_keys):
            yield from unknown_key(inside, inner, (), config_keys)
        else:
            without = True
    if row is not None and without:
        yield _another_stack(path, row)


def _has_answer(path: tuple[str, ...], value: Any, config_keys: ConfigKeys) -> bool:
    if foreign_key(path) is not None or normalized(path[-1]) in config_keys:
        return True
    return isinstance(value, dict) and any(
        _has_answer((*path, str(n)), inner, config_keys) for n, inner in value.items()
    )


def _are_keys_of(section: tuple[str, ...], value: Any, config_keys: ConfigKeys) -> bool:
    """Whether everything in ``value`` is a key that ``section`` has."""
    if not isinstance(value, dict):
        return ".".join(section) in config_keys.get(section[-1], ())
    return all(_are_keys_of((*section, str(name)), inner, config_keys) for name, inner in value.items())


def _misspelt(path: tuple[str, ...], near: Sequence[str], known: Sequence[str]) -> Problem:
    remedy = f"did you mean `{near[0]}`?" if near else "remove it."
    listed = f" Known: {', '.join(known)}" if known else ""
    return Problem(".".join(path), "is not a known key", f"{remedy}{listed}")


def _another_stack(path: tuple[str, ...], row: ForeignKey) -> Problem:
    ours = " and ".join(f"`{key}`" for key in row.ours.split())
    remedy = f"use {ours}{': ' if row.how else ''}{row.how}" if ours else row.how
    return Problem(".".join(path), f"is not a known key here, but one of {row.stacks}", remedy)
