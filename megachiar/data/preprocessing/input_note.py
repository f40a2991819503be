"""Keep what each input was when it was read, so that an input whose times are still the same is not read again.

The note ``PREFIX.inputs`` stands beside a dataset and holds a record of each input, see ``source_records``. Its times
are those before the reading began: an input that was changed later has others. The manifest cannot hold them, since it
is the same for the same text. Where the note is missing, as beside a dataset that came from elsewhere, all inputs are
read and compared. A record counts only where its checksum is the one in the manifest, so that the note of another
dataset proves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_json

NOTE_VERSION = 1
ENTRIES = 4  # of a record: name, bytes, times, checksum


def input_note_path(prefix: Path | str) -> Path:
    """Return the note on the inputs of what was written as ``prefix``: a dataset, or the parts of a split."""
    return Path(f"{prefix}.inputs")


def write_input_note(prefix: Path | str, records: Iterable[Sequence[Any]]) -> None:
    """Write the records of the inputs of ``prefix``; those of earlier versions, without checksum, are left out.

    Raises:
        UserError: the disk is full or read-only.
    """
    content = {"inputs": NOTE_VERSION, "records": [record for record in records if len(record) == ENTRIES]}
    write_atomically(input_note_path(prefix), (json.dumps(content, ensure_ascii=False) + "\n").encode())


class InputNote:
    """Hold the note on the inputs of ``prefix``; it is empty where there is none that can be read.

    Args:
        prefix: what was written of the inputs.
    """

    def __init__(self, prefix: Path | str):
        self._known: set[str] = set()
        try:
            content = parse_json(read_regular(input_note_path(prefix)))
            if content["inputs"] == NOTE_VERSION:
                self._known = {json.dumps(record) for record in content["records"]}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return

    def proves(self, identity: Sequence[Any], checksum: str) -> bool:
        """Return whether an input that has the identity [name, bytes, times] now was read with this checksum."""
        _, size, times = identity
        return size is not None and times is not None and json.dumps([*identity, checksum]) in self._known
