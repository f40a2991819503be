"""Open regular files alone: opening a fifo waits for a writer, for ever if none comes, and a device has no end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

RECORD_LIMIT = 1 << 28
"""Largest size in bytes of a file that is read whole: a record, a config, a vocabulary."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: Path | str) -> None:
    """Check that ``path`` is a regular file, or a link to one.

    Raises:
        OSError: it is something else, with ``ENODEV``; or the system refuses to look at it.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.ENODEV, f"it is {kind}, not a regular file", str(path))


def open_regular(path: Path | str) -> BinaryIO:
    """Open a regular file, unbuffered, for reading.

    Raises:
        OSError: ``check_regular`` raises it, or the file cannot be opened.
    """
    check_regular(path)
    return open(path, "rb", buffering=0)


def read_regular(path: Path | str, limit: int = RECORD_LIMIT) -> bytes:
    """Return the content of a regular file that is small where it is whole.

    Raises:
        OSError: ``open_regular`` raises it, or the file has more than ``limit`` bytes.
    """
    parts: list[bytes] = []
    left = limit + 1
    with open_regular(path) as file:
        while left > 0 and (part := file.read(min(left, 1 << 24))):
            parts.append(part)
            left -= len(part)
    if left <= 0:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return b"".join(parts)
