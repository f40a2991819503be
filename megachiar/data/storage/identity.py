"""Tell a file that was touched from one that was not; this module imports nothing that takes long."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def printable(path: Path | str) -> str:
    """Return a path as text that can be printed and stored; bytes that are no UTF-8 are written as ``\\xff``."""
    return os.fsencode(path).decode(errors="backslashreplace")


def file_identity(path: Path) -> list[Any]:
    """Return [name, bytes, times], by which a later run tells that a file was not touched.

    The times are those of the last change of the content and of the last change at all, in nanoseconds. A program can
    set the first one, but not the second.
    """
    status = os.stat(path)
    return [printable(path), status.st_size, [status.st_mtime_ns, status.st_ctime_ns]]
