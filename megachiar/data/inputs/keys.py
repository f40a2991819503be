"""Find the value of a record by its key, which may be a path into nested objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

MISSING: Final = object()
"""What ``find_value`` returns where there is no such key; null is a value."""


def find_value(record: Mapping[str, Any], key: str) -> Any:
    """Return the value under ``key``, or MISSING.

    Args:
        record: values by key.
        key: a key of the record, or keys joined by dots that lead through nested objects. A key that has dots itself
            comes first.
    """
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return MISSING
        value = value[part]
    return value
