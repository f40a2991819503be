"""Chunks of many small files handed to a worker together: one hand-over costs as much as reading dozens of them.

A group begins where a source begins, or goes on with a source and ends with it: so that a run that goes on again can
count whole sources between groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from megachiar.data.inputs.documents import Chunk, ReadOptions
from megachiar.data.inputs.readers import read_chunks
from megachiar.data.inputs.source import Source

GROUP_BYTES = 256 << 10  # of text, from which on a group is handed over
BYTES_OF_A_CHUNK = 256  # that it takes beside its text


class ChunkGroup(NamedTuple):
    """Chunks that follow each other.

    Attributes:
        chunks: at least one.
        first_source: number of the source that the group begins with.
        begins_source: the group holds the beginning of that source, so that all before it are in earlier groups.
    """

    chunks: list[Chunk]
    first_source: int
    begins_source: bool


def read_groups(sources: Iterable[tuple[int, Source]], options: ReadOptions) -> Iterator[ChunkGroup]:
    """The chunks of numbered sources, in order.

    Raises:
        UserError: as ``read_chunks``.
    """
    group, size = ChunkGroup([], 0, True), 0
    for number, source in sources:
        begins = True
        for chunk in read_chunks([source], options):
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
