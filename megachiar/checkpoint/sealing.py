"""Seal a record: its last field is the checksum of all bytes before it, so that an edit or a flipped bit is noticed."""

from __future__ import annotations

import re

from pydantic import BaseModel

from megachiar.checkpoint.checksums import checksum

SEAL = "seal"
_SEALED = re.compile(rb'(?P<body>.*),\n  "seal": "(?P<seal>[0-9a-f]{32})"\n}\n', re.DOTALL)


def sealed_json(record: BaseModel) -> bytes:
    """Return a record as JSON whose last field is its seal."""
    return seal_json(record.model_dump_json(indent=2))


def seal_json(text: str) -> bytes:
    """Return an object in JSON, indented by 2, with its seal as the last field."""
    body = text.removesuffix("\n}").encode()
    return body + f',\n  "{SEAL}": "{checksum(body)}"\n}}\n'.encode()


def seal_fits(text: bytes) -> bool | None:
    """Return whether the seal of a record fits its content; None if it has no seal."""
    found = _SEALED.fullmatch(text)
    return None if found is None else checksum(found["body"]) == found["seal"].decode()
