"""Read a file of JSON lines while a run appends to it: each line once, however long the file is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from megachiar.data.storage.regular_file import open_regular
from megachiar.errors import disk_errors
from megachiar.training.metrics import parse_record

_BLOCK = 1 << 24  # bytes of one reading
_REMEMBERED = 64  # bytes before the place that was read last, which must still be there


class NewLines(NamedTuple):
    """What a reading found.

    Attributes:
        anew: whether the file was replaced or shortened, so that these are its first lines and earlier ones are void.
        records: of the lines that hold one, oldest first.
        damaged: how many whole lines hold none.
    """

    anew: bool
    records: list[dict[str, Any]]
    damaged: int


class GrowingFile:
    """The lines of a file that grows, or that its run replaces by a shorter one when it goes back.

    A last line without its end is left for the next reading. A file that is not there yet has no lines.

    Attributes:
        path: of the file.
        written: time of the last write, in seconds of the file system's clock; None as long as there is no file.
        has_more: whether the last reading has left lines, which the next one takes.
    """

    def __init__(self, path: Path):
        self.path = path
        self.written: float | None = None
        self.has_more = False
        self._forget()

    def _forget(self) -> None:
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._before = b""

    def read(self) -> NewLines:
        """Return the lines that are new since the last reading, at most 16 MiB of them.

        Raises:
            UserError: the system refuses to read the file.
        """
        with disk_errors(self.path, "read"):
            try:
                file = open_regular(self.path)
            except (FileNotFoundError, NotADirectoryError):
                was_there, self.written, self.has_more = self.written is not None, None, False
                self._forget()
                return NewLines(was_there, [], 0)
            with file:
                status = os.fstat(file.fileno())
                anew = self._is_another(file.fileno(), (status.st_dev, status.st_ino), status.st_size)
                self._identity, self.written = (status.st_dev, status.st_ino), status.st_mtime
                content = os.pread(file.fileno(), _BLOCK, self._offset)
        return self._take(content, status.st_size, anew)

    def _is_another(self, descriptor: int, identity: tuple[int, int], size: int) -> bool:
        """Return whether what was read is not in the file any more; the next reading then begins at its start."""
        place = self._offset - len(self._before)
        same = self._identity in (None, identity) and os.pread(descriptor, len(self._before), place) == self._before
        if same and size >= self._offset:
            return False
        self._forget()
        return True

    def _take(self, content: bytes, size: int, anew: bool) -> NewLines:
        end = content.rfind(b"\n") + 1
        if not end and len(content) == _BLOCK:  # one line of 16 MiB is no record
            end = len(content)
        whole = content[:end]
        self._offset += end
        self._before = (self._before + whole)[-_REMEMBERED:]
        self.has_more = bool(end) and len(content) == _BLOCK and self._offset < size
        found = [parse_record(line) for line in whole.split(b"\n")[:-1] if line.strip()]
        records = [record for record in found if record is not None]
        return NewLines(anew, records, len(found) - len(records))
