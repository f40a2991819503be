"""Group the chunks of many small files, since handing a group to a worker costs as much as reading dozens of files.

A group begins where a source begins, or it continues one source and ends with it. So a run that is continued can count
whole sources between groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megachiar.data.inputs.documents import Chunk, ReadOptions
from megachiar.data.inputs.readers import read_chunks
from megachiar.data.inputs.source import Source
from megachiar.data.inputs.source_reading import SourceRecorder

GROUP_BYTES = 256 << 10  # a group with as much text is complete
BYTES_OF_A_CHUNK = 256  # that a chunk takes beside its text


class ChunkGroup(NamedTuple):
    """Hold chunks that follow each other.

    Attributes:
        chunks: the chunks, at least one.
        first_source: the number of the source that the group begins with.
        begins_source: whether the group begins with the beginning of that source, so that earlier groups hold all
            sources before it.
    """

    chunks: list[Chunk]
    first_source: int
    begins_source: bool


def read_groups(
    sources: Iterable[tuple[int, Source]], options: ReadOptions, recorder: SourceRecorder
) -> Iterator[ChunkGroup]:
    """Yield the chunks of numbered sources in groups, in order.

    Args:
        sources: the sources to read, each with its number.
        options: how documents are found in them.
        recorder: makes a record of each source.

    Raises:
        UserError: ``read_chunks`` raises it.
    """
    group, size = ChunkGroup([], 0, True), 0
    for number, source in sources:
        begins = True
        for chunk in read_chunks([source], options, recorder):
            if group.chunks and begins and not group.begins_source:
                yield group
                group, size = ChunkGroup([], 0, True), 0
            if not group.chunks:
                group = ChunkGroup([], number, begins)
            group.chunks.append(chunk)
            size += chunk.size + BYTES_OF_A_CHUNK
            begins = False
            if size >= GROUP_BYTES:
                yield group
                group, size = ChunkGroup([], 0, True), 0
    if group.chunks:
        yield group
