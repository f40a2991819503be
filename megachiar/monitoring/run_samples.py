"""Texts that a run wrote while it trained, where it has recorded any.

A record of kind ``samples`` or ``sample`` has them: as a list ``samples``, or as itself, of values ``prompt`` and
``text``. A run that records none shows none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = ("samples", "sample")


def samples_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the texts of a record: step, prompt and text of each; nothing of a record that has none."""
    if record.get("kind") not in KINDS:
        return []
    listed = record.get("samples")
    entries = listed if isinstance(listed, list) else [record]
    found = []
    for entry in entries:
        if isinstance(entry, Mapping) and isinstance(text := entry.get("text"), str):
            prompt = entry.get("prompt")
            found.append({"step": record["step"], "prompt": prompt if isinstance(prompt, str) else "", "text": text})
    return found
