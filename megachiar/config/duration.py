"""Read a duration as people write it: ``11h30m``, ``2d``, ``90s``, or seconds as a plain number."""

from __future__ import annotations

import re
from typing import Any

from pydantic_core import PydanticCustomError

_SECONDS = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_DURATION = re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in _SECONDS))


def parse_duration(value: Any) -> Any:
    """Return the seconds of a duration in words; what is no text is returned as it is, for the field to check.

    Raises:
        PydanticCustomError: the text is no duration.
    """
    if not isinstance(value, str):
        return value
    text = re.sub(r"\s", "", value)
    found = _DURATION.fullmatch(text)
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not text or found is None:
        raise PydanticCustomError("duration", "a duration, such as 11h30m, 45m, 90s or a number of seconds")
    numbers = [float(number or 0) for number in found.groups()]
    return sum(number * seconds for number, seconds in zip(numbers, _SECONDS.values(), strict=True))
