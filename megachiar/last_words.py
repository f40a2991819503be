"""Print why a process ends, once, from whichever of its threads learns it first.

Ranks that end together share one standard error. Each message is one write of whole lines, so that those of two ranks
never stand on one line. A process says one reason: what its other threads notice meanwhile follows from the same end.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading

LIMIT_S = 2.0
_first = threading.Lock()
"""Held for good by the thread that was first; it belongs to the process, as standard error does."""


def print_last_words(message: str) -> None:
    """Print ``message`` on standard error, unless this process has printed its last words before."""
    if _first.acquire(blocking=False):
        write_within_limit(f"{message}\n")


def write_within_limit(text: str) -> None:
    """Write ``text`` to standard error, or give it up after ``LIMIT_S``: a pipe that nobody reads is full for ever."""
    writer = threading.Thread(target=_write, args=[text], name="last words", daemon=True)
    writer.start()
    writer.join(LIMIT_S)


def _write(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads standard error any more
        sys.stderr.flush()
        left = memoryview(text.encode(errors="backslashreplace"))
        while left:
            left = left[os.write(sys.stderr.fileno(), left) :]
