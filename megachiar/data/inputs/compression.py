"""Read an input in decompressed blocks: gzip, Zstandard, xz and bzip2, with any number of members.

The libraries' file objects take a truncated file, or foreign bytes after a member, for the end of the text. This module
reports both.
"""

from __future__ import annotations

import bz2
import io
import itertools
import lzma
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from megachiar.data.inputs import remote
from megachiar.data.inputs.pipe import open_input
from megachiar.data.inputs.recognition import (
    COMPRESSION_NAMES,
    HEAD_BYTES,
    begins_compressed,
    refuse_other_compression,
)
from megachiar.data.inputs.source import Compression, Source
from megachiar.data.storage.files import read_ahead
from megachiar.errors import UserError

READ_BYTES = 1 << 18  # read of a plain file at once
COMPRESSED_READ_BYTES = 1 << 14  # read at once; small, because the text may be a thousand times larger
ZSTD_BYTES = 1 << 10  # decompressed at once; the text may be 30,000 times larger, and the library has no bound for it
LARGEST_ZSTD_WINDOW = 1 << 31  # bytes; `zstd --long=31` is the most its tool writes
SHOWN_BYTES = 16  # of foreign bytes that follow whole data
MOST_TEXT = 1 << 22  # bytes that xz and bzip2 give at once; the text may be ten thousand times larger

OnContent = Callable[[bytes], None]


class Codec(NamedTuple):
    """Describe how to decompress one format.

    Attributes:
        new_member: makes the decompressor of one member (gzip), frame (Zstandard) or stream (xz, bzip2).
        broken: the exception that the decompressor raises for damaged data.
        bounded: whether the decompressor takes a bound for the text it gives at once, and has ``needs_input``.
        test: the shell command that checks whether a file is whole.
    """

    new_member: Callable[[], Any]
    broken: type[Exception]
    bounded: bool
    test: str


def _zstd_codec() -> Codec:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_ZSTD_WINDOW)
    return Codec(decompressor.decompressobj, zstandard.ZstdError, False, "zstd -t")


CODECS: dict[Compression, Callable[[], Codec]] = {
    "gz": lambda: Codec(lambda: zlib.decompressobj(wbits=31), zlib.error, False, "gzip -t"),
    "zst": _zstd_codec,
    "xz": lambda: Codec(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), lzma.LZMAError, True, "xz -t"),
    "bz2": lambda: Codec(bz2.BZ2Decompressor, OSError, True, "bzip2 -t"),
}


def text_blocks(source: Source, on_content: OnContent | None = None) -> Iterator[tuple[bytes, int]]:
    """Yield the text of ``source`` in blocks, each with the number of bytes read from the disk for it.

    Args:
        source: the source to read.
        on_content: called with each block as it is on the disk.

    Raises:
        UserError: the source has another compression than its name says, or is damaged or truncated.
    """
    raw = raw_blocks(source) if on_content is None else _watched(raw_blocks(source), on_content)
    if source.compression:
        return _decompressed(raw, source, CODECS[source.compression]())
    return ((block, len(block)) for block in raw)


def _watched(blocks: Iterator[bytes], on_content: OnContent) -> Iterator[bytes]:
    """Yield ``blocks``, after calling ``on_content`` with each."""
    for block in blocks:
        on_content(block)
        yield block


def raw_blocks(source: Source) -> Iterator[bytes]:
    """Yield the bytes of ``source`` in blocks, as they are on the disk."""
    size = COMPRESSED_READ_BYTES if source.compression else READ_BYTES
    if source.url is not None:
        with remote.open_to_read(source.url) as file:
            yield from _read_all(file, size)
        return
    if source.path is None:
        yield from _read_all(sys.stdin.buffer, size)
        return
    with open_input(source.path) as file:
        if block := file.read(size):
            yield block
        if len(block) == size:
            read_ahead(file)
            yield from _read_all(file, size)


def _read_all(file: BinaryIO | io.RawIOBase, size: int) -> Iterator[bytes]:
    """Yield the rest of ``file`` in blocks of at most ``size`` bytes."""
    while block := file.read(size):
        yield block


def gather(blocks: Iterator[bytes], least: int) -> tuple[bytes, Iterator[bytes]]:
    """Return the first ``least`` bytes or more, if there are so many, and an iterator over all blocks."""
    head = b""
    for block in blocks:
        head += block
        if len(head) >= least:
            break
    return head, itertools.chain([head] if head else [], blocks)


def _decompressed(raw: Iterator[bytes], source: Source, codec: Codec) -> Iterator[tuple[bytes, int]]:
    """Yield the text of all members, in blocks, each with the number of bytes read from the disk for it."""
    head, raw = gather(raw, HEAD_BYTES)
    refuse_other_compression(source, head)
    if source.compression == "zst":
        raw = _cut(raw, ZSTD_BYTES)
    member, position, began = None, 0, 0  # bytes of the blocks before, and of the members before
    for block in raw:
        rest = block
        while rest:
            if member is None:
                member, began = codec.new_member(), position + len(block) - len(rest)
                if began > 0:
                    _check_next_member(source, codec, began, rest, raw)
            try:
                for text in _texts(member, rest, codec):
                    yield text, 0
            except codec.broken as error:
                near = max(position, began)
                raise _damaged(source, codec, f"is damaged near byte {near}: {error}") from error
            rest = member.unused_data if member.eof else b""
            member = None if member.eof else member
        position += len(block)
        yield b"", len(block)
    if member is not None or position == 0:
        raise _damaged(
            source, codec, f"is truncated: it ends after {position} bytes in the middle of the compressed data"
        )


def _cut(blocks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Yield the bytes of ``blocks`` in blocks of at most ``size`` bytes."""
    for block in blocks:
        for first in range(0, len(block), size):
            yield block[first : first + size]


def _texts(member: Any, data: bytes, codec: Codec) -> Iterator[bytes]:
    """Yield the text of ``data``, in blocks of bounded size where the library has a bound."""
    if not codec.bounded:
        yield member.decompress(data)
        return
    yield member.decompress(data, MOST_TEXT)
    while not (member.eof or member.needs_input):
        yield member.decompress(b"", MOST_TEXT)


def _check_next_member(source: Source, codec: Codec, end: int, rest: bytes, raw: Iterator[bytes]) -> None:
    """Refuse foreign bytes (``rest``, then ``raw``) after whole members, which end at byte ``end``.

    Raises:
        UserError: it is padding, or anything else.
    """
    if rest[0] == 0:
        raise _padded(source, codec, end, rest, raw)
    if not begins_compressed(source.compression, rest):
        raise UserError(
            source.name,
            f"is whole up to byte {end}, but goes on with other than {COMPRESSION_NAMES[source.compression]} data: "
            f"{rest[:SHOWN_BYTES]!r}",
            f"fetch it again, or cut off the bytes that do not belong to it: {_cutting(source, end)}",
        )


def _cutting(source: Source, end: int) -> str:
    """Return the command that cuts a source at byte ``end``."""
    return f"`truncate -s {end} {shlex.quote(source.name)}`"


def _padded(source: Source, codec: Codec, end: int, rest: bytes, raw: Iterator[bytes]) -> UserError:
    """Return the error for zeros after the whole members that end at byte ``end``; ``rest`` and ``raw`` follow."""
    if any(part.count(0) != len(part) for part in itertools.chain([rest], raw)):
        return _damaged(source, codec, f"is damaged near byte {end}: zeros stand where compressed data should follow")
    return UserError(
        source.name,
        f"holds only zeros from byte {end} on, after whole compressed data: padding, or an end that never came",
        f"if it is as large as its original, fetch it again; if padded, cut it: {_cutting(source, end)}",
    )


def _damaged(source: Source, codec: Codec, problem: str) -> UserError:
    return UserError(source.name, problem, f"fetch it again; `{codec.test}` tells when it is whole")
