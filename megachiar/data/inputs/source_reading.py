"""Keep the checksum of a source's content while the source is read, so that it need not be read twice."""

from __future__ import annotations

import zlib
from typing import Any

from megachiar.data.inputs.source import COLUMNAR, Source


class SourceReading:
    """Hold the identity of a source when its reading began, and the checksum of the bytes read so far.

    Args:
        source: a source that is about to be read.
    """

    def __init__(self, source: Source):
        self._source, self._identity = source, source.identity()
        self._crc = self._bytes = 0

    def add(self, content: bytes) -> None:
        """Take in the next bytes: bytes of the file, or of parquet and Arrow a row of the columns that are read."""
        self._crc = zlib.crc32(content, self._crc)
        self._bytes += len(content)

    @property
    def checksum(self) -> str:
        """Return the checksum of all bytes so far, such as ``"crc32:0d4a1185"``."""
        return f"crc32:{self._crc:08x}"

    def record(self) -> list[Any]:
        """Return [name, bytes, times, checksum] of a source that was read to its end."""
        name, size, times = self._identity
        known = self._source.format in COLUMNAR and size is not None  # the added bytes are a part of the file
        return [name, size if known else self._bytes, times, self.checksum]


class SourceRecorder:
    """Make a record of each source that is read, in the order of reading."""

    def __init__(self) -> None:
        self._readings: list[SourceReading] = []

    def begin(self, source: Source) -> SourceReading:
        """Return the reading of the next source."""
        self._readings.append(SourceReading(source))
        return self._readings[-1]

    def records(self, first: int = 0, end: int | None = None) -> list[list[Any]]:
        """Return the records of the sources from ``first`` up to ``end``; all must have been read to their ends."""
        return [reading.record() for reading in self._readings[first:end]]
