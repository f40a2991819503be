"""Record the content of each source while it is read, and tell later whether a source still has that content.

A *record* is the list [name, bytes, times, checksum], with ``Source.identity`` at its beginning. A source whose size
and times are the recorded ones is taken as unchanged. One with other times is read: copying a file, or checking it out,
changes its times and not its text. Records of earlier versions have no checksum; there the time of the content decides.

The checksum is a CRC-32, the fastest that Python has. With the size it notices every accidental change, and it need not
resist an attack. It covers the bytes on the disk, and of parquet and Arrow, which are read here and there, the rows of
the columns that are read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TextIO

from megachiar.data.inputs.compression import raw_blocks
from megachiar.data.inputs.documents import ReadOptions
from megachiar.data.inputs.readers import chunk_reader
from megachiar.data.inputs.source import COLUMNAR, Source
from megachiar.data.inputs.source_reading import SourceReading
from megachiar.data.preprocessing.input_note import ENTRIES
from megachiar.errors import disk_errors
from megachiar.progress import ByteProgress


class Suspect(NamedTuple):
    """Name a source whose times say that it may have been changed, and the size and checksum that it had."""

    source: Source
    size: int
    checksum: str


def find_changed(
    sources: Sequence[Source], records: Sequence[Sequence[Any]], read: ReadOptions, stream: TextIO | None = None
) -> Source | None:
    """Return the first source that differs from its record; None if none does.

    Args:
        sources: the sources as they are now.
        records: a record of each, in the same order.
        read: how the sources were read, of which the columns of parquet count.
        stream: where progress is shown while sources are read; standard error if None.

    Raises:
        UserError: a source cannot be read.
    """
    suspects = []
    for source, record in zip(sources, records, strict=True):
        if len(record) < ENTRIES:
            if source.identity_by_content_time() != list(record):
                return source
        elif source.identity() != list(record[:3]):
            suspects.append(Suspect(source, record[1], record[3]))
    return find_other_content(suspects, read, stream)


def find_other_content(suspects: Sequence[Suspect], read: ReadOptions, stream: TextIO | None = None) -> Source | None:
    """Return the first source of another size or checksum than it had; None if there is none.

    Sources are read only if all have their sizes. One that can be read only once counts as changed.

    Raises:
        UserError: a source cannot be read.
    """
    for suspect in suspects:
        if suspect.source.size != suspect.size:
            return suspect.source
    if not suspects:
        return None
    with ByteProgress("comparing inputs", sum(suspect.size for suspect in suspects), stream) as progress:
        for suspect in suspects:
            if _checksum(suspect.source, read, str(suspect.source.identity())) != suspect.checksum:
                return suspect.source
            progress.advance(suspect.size)
    return None


@functools.lru_cache(maxsize=1 << 16)
def _checksum(source: Source, read: ReadOptions, identity: str) -> str:
    """Return the checksum of a source; one that is asked for again, with the same ``identity``, is not read again."""
    reading = SourceReading(source)
    with disk_errors(source.name, "read"):
        if source.format in COLUMNAR:
            options = replace(read, max_document_bytes=source.size or 1 << 62)
            for _ in chunk_reader(source)(source, options, reading.add):
                pass
        else:
            for block in raw_blocks(source):
                reading.add(block)
    return reading.checksum
