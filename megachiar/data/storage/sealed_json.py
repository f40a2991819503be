"""Read records in JSON, and seal them: the last key, ``seal``, is a checksum of all others.

A seal tells of damage, where a number with another digit would be as good a number. It keeps nobody out who alters a
record on purpose, and it covers the values, not the spelling: the lines of a record may be laid out anew. Records
without a seal were written by earlier versions, or by hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "seal"


def parse_json(content: bytes | str) -> Any:
    """Return the value of a text in JSON.

    Raises:
        ValueError: it is no JSON, not UTF-8, or nested too deep to be read.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def seal_of(record: Mapping[str, Any], before: str = "") -> str:
    """Return the seal of a record: 32 hexadecimal digits.

    Args:
        record: values that JSON can represent, without a seal.
        before: the seal of the record before this one, where the order of records matters.
    """
    content = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{before}{content}".encode()).hexdigest()[:32]


def with_seal(record: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return ``record`` with its seal, see ``seal_of``."""
    return {**record, SEAL: seal_of(record, before)}


def pretty_sealed(record: Mapping[str, Any]) -> bytes:
    """Return ``record`` with its seal as the content of a file that people read too."""
    return (json.dumps(with_seal(record), indent=2, ensure_ascii=False) + "\n").encode()


def without_seal(record: Any, before: str = "") -> Any:
    """Return a record that was read without its seal; what has none is returned as it is.

    Raises:
        ValueError: the seal does not fit the other values.
    """
    if not isinstance(record, dict) or SEAL not in record:
        return record
    rest = {key: value for key, value in record.items() if key != SEAL}
    try:
        expected = seal_of(rest, before)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if record[SEAL] != expected:
        raise ValueError("it was altered: its seal does not fit its content")
    return rest


def parse_sealed(content: bytes | str) -> Any:
    """Return the value of a text in JSON, without its seal if it has one.

    Raises:
        ValueError: ``parse_json`` or ``without_seal`` raises it.
    """
    return without_seal(parse_json(content))
