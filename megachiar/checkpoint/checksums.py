"""Write files with a checksum of what was meant to be in them, and compute the checksum of what is in them later.

The checksum is XXH3-128. It is computed from memory at some 25 GB/s, where SHA-256 reaches 2 GB/s. It notices damage
and mistakes; it does not keep out somebody who alters a checkpoint on purpose.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import xxhash

from megachiar.data.storage.regular_file import open_regular

BLOCK = 1 << 20
"""Bytes that are written or read and hashed in one go. A block stays in the processor's cache between the two."""
REPORTED_BYTES = 1 << 26
"""Bytes between two reports of progress."""


class FileRecord(NamedTuple):
    """Size in bytes and hexadecimal XXH3-128 of one file."""

    size: int
    checksum: str


class ChecksummedFile:
    """A new file that is written in order, in a ``with`` block, and forced to the disk at its end.

    The checksum is that of the bytes in memory, so that it also tells of damage on the way to the disk.

    Raises:
        OSError: the disk is full or read-only; the file is then incomplete.
    """

    def __init__(self, path: Path):
        self._file = open(path, "wb")  # noqa: SIM115 (closed by __exit__)
        self._digest = xxhash.xxh3_128()
        self._size = 0

    def write(self, data: memoryview | bytes) -> None:
        """Append ``data``, the bytes of which must not change before the call returns."""
        whole = memoryview(data)
        for first in range(0, len(whole), BLOCK):
            block = whole[first : first + BLOCK]
            self._digest.update(block)
            self._file.write(block)
        self._size += len(whole)

    @property
    def record(self) -> FileRecord:
        """Size and checksum of all that was written."""
        return FileRecord(self._size, self._digest.hexdigest())

    def __enter__(self) -> ChecksummedFile:
        return self

    def __exit__(self, kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def write_checksummed(path: Path, content: bytes) -> FileRecord:
    """Write a file of ``content``, force it to the disk, and return its size and checksum."""
    with ChecksummedFile(path) as file:
        file.write(content)
    return file.record


def checksum(content: bytes | memoryview) -> str:
    """Return the hexadecimal XXH3-128 of ``content``."""
    return xxhash.xxh3_128_hexdigest(content)


def checksum_of_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the hexadecimal XXH3-128 of a file, which is read in bounded memory.

    Args:
        path: of the file.
        on_bytes: is called with the number of bytes read since its last call, now and then and at the end.

    Raises:
        OSError: the file cannot be read, or is no regular file.
    """
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
    unreported = 0
    with open_regular(path) as file:
        while read := file.readinto(buffer):  # type: ignore[attr-defined]  # unbuffered files have it
            digest.update(buffer[:read])
            unreported += read
            if on_bytes is not None and unreported >= REPORTED_BYTES:
                on_bytes(unreported)
                unreported = 0
    if on_bytes is not None:
        on_bytes(unreported)
    return digest.hexdigest()
