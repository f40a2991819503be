"""Read numbers that a client sends as JSON, and say in one message what is wrong with one."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from megachiar.errors import UserError


class Setting(NamedTuple):
    """A number that a request may hold.

    Attributes:
        default: where the request has none.
        is_whole: whether it must be a whole number.
        least: the least number that is allowed.
        most: the greatest.
    """

    default: float | None
    is_whole: bool
    least: float
    most: float


def read_number(name: str, value: Any, setting: Setting) -> float | int | None:
    """Return the number ``value`` of the field ``name``, or the default for None.

    Raises:
        UserError: it is no number, or not within its limits.
    """
    if value is None:
        return setting.default
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not _is_finite(value) or (setting.is_whole and value != int(value)):
        raise UserError(name, f"{value!r:.50} is no {'whole ' if setting.is_whole else ''}number", "give one")
    if not setting.least <= value <= setting.most:
        raise UserError(name, f"{value!s:.50} is not {_limits(setting)}", "give another one")
    return int(value) if setting.is_whole else float(value)


def _is_finite(value: float) -> bool:
    """Return whether a number is within the range of float, which a whole number of JSON may leave."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _limits(setting: Setting) -> str:
    least = "above 0" if setting.least == math.ulp(0) else f"at least {setting.least:,}"
    return least if math.isinf(setting.most) else f"{least} and at most {setting.most:,}"
