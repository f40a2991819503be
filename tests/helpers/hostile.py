"""Ways to damage a file, and what may stand in a file's place."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megachiar.errors import UserError

EXAMPLES = pytest.mark.parametrize(
    "examples", [150, pytest.param(1500, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
"""Marks a test that takes ``examples``: how many damages it tries."""

IN_PLACE: dict[str, Callable[[Path], object]] = {
    "a fifo": os.mkfifo,
    "a folder": os.mkdir,
    "a link to nothing": lambda path: path.symlink_to("/nonexistent/file"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "an empty device": lambda path: path.symlink_to("/dev/null"),
    "nothing in it": lambda path: path.write_bytes(b""),
    "brackets": lambda path: path.write_bytes(b"[" * 100_000),
    "braces": lambda path: path.write_bytes(b'{"data":' * 100_000),
}
"""What stands in a file's place -> a function that puts it there."""

HOSTILE_VALUES = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e300, float("nan"), "", "x", "a\0b", "\ud800"),
    *("../../outside", "/etc/passwd", [], {}, [[]], [[5, 1]], [None], {"a": 1}, "9" * 5000),
)


def put_in_place(path: Path, what: str) -> None:
    """Put something else in the place of the file at ``path``."""
    path.unlink(missing_ok=True)
    IN_PLACE[what](path)


def fresh_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """Make ``folder`` anew with these files in it."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def refused(action: Callable[[], object]) -> UserError | None:
    """Return the error that ``action`` ends with, which has a remedy and is not long; None if it ends well."""
    try:
        action()
    except UserError as error:
        assert error.remedy and len(str(error)) < 20_000
        return error
    return None


def for_each_damage(content: bytes, check: Callable[[bytes], object], examples: int) -> None:
    """Call ``check`` with ``content`` after each of so many damages, the same ones in each run."""

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damages(content))
    def checked(damaged: bytes) -> None:
        check(damaged)

    checked()


def damages(content: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for ``content`` with bits flipped, bytes replaced, cut off, put in or zeroed."""
    places = st.integers(0, len(content) - 1)
    digits = [place for place, byte in enumerate(content) if byte in b"0123456789"]
    kinds = [
        st.builds(_flipped, st.just(content), places, st.integers(0, 7)),
        st.builds(_replaced, st.just(content), places, st.binary(min_size=1, max_size=8)),
        st.builds(lambda end: content[:end], places),
        st.builds(lambda place, more: content[:place] + more + content[place:], places, st.binary(max_size=4)),
        st.builds(_zeroed, st.just(content), places, st.integers(1, 100)),
        *(
            [st.builds(_replaced, st.just(content), st.sampled_from(digits), st.sampled_from(_DIGITS))]
            if digits
            else []
        ),
    ]
    return st.one_of(kinds)


_DIGITS = [b"%d" % digit for digit in range(10)]


def _flipped(content: bytes, place: int, bit: int) -> bytes:
    return _replaced(content, place, bytes([content[place] ^ 1 << bit]))


def _replaced(content: bytes, place: int, new: bytes) -> bytes:
    return (content[:place] + new + content[place + len(new) :])[: len(content)]


def _zeroed(content: bytes, place: int, count: int) -> bytes:
    return _replaced(content, place, bytes(count))


def with_hostile_values(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return ``record`` with each of its values, at any depth, replaced by each hostile value, and left out."""
    changed = []
    for path in _paths(record):
        for value in HOSTILE_VALUES:
            other = copy.deepcopy(record)
            _inside(other, path[:-1])[path[-1]] = value
            changed.append(other)
        other = copy.deepcopy(record)
        del _inside(other, path[:-1])[path[-1]]
        changed.append(other)
    return changed


def _paths(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in ((*before, key), *_paths(inner, (*before, key)))]


def _inside(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def unsealed(content: bytes) -> dict[str, Any]:
    """Return a record in JSON without its seal, as an earlier version wrote it."""
    record = json.loads(content)
    record.pop("seal", None)
    return record
