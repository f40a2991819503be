"""Open an input that may be a named pipe, without waiting for ever for a program that writes to it."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path
from typing import BinaryIO

from megachiar.errors import UserError

WAIT_FOR_WRITER_S = 60.0
_POLL_MS = 100


def open_input(path: Path) -> BinaryIO:
    """Open a file or a pipe, unbuffered, for reading.

    Raises:
        UserError: no program has opened a named pipe to write to it for ``WAIT_FOR_WRITER_S`` seconds.
        OSError: the system refuses to open the file.
    """
    if not path.is_fifo():
        return open(path, "rb", buffering=0)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        _await_writer(path, descriptor)
        os.set_blocking(descriptor, True)
    except BaseException:
        os.close(descriptor)
        raise
    return open(descriptor, "rb", buffering=0)


def _await_writer(path: Path, descriptor: int) -> None:
    """Wait until a program has the other end of a pipe open, or had it.

    A pipe without a name, such as a shell's ``<(command)``, always had a writer.
    """
    poll, until = select.poll(), time.monotonic() + WAIT_FOR_WRITER_S
    poll.register(descriptor, select.POLLIN)
    has_name = os.path.exists(os.path.realpath(path))
    while not poll.poll(_POLL_MS) and has_name and not _has_writer(descriptor):
        if time.monotonic() > until:
            raise UserError(
                path,
                f"is a pipe that no program has opened to write to for {WAIT_FOR_WRITER_S:g} s",
                "start the program that writes to it, or name a file",
            )


def _has_writer(descriptor: int) -> bool:
    """Return whether a program has the other end of an empty pipe open."""
    try:
        os.read(descriptor, 1)
    except BlockingIOError:
        return True
    return False
