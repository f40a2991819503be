"""Print why a process ends, once, from whichever of its threads learns it first.

Ranks that end together share one standard error. Each message is one write of whole lines, so that those of two ranks
never stand on one line. A process says one reason: what its other threads notice meanwhile follows from the same end.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading

_first = threading.Lock()
"""Held for good by the thread that was first; it belongs to the process, as standard error does."""


def print_last_words(message: str) -> None:
    """Print ``message`` on standard error, unless this process has printed its last words before."""
    if not _first.acquire(blocking=False):
        return
    with contextlib.suppress(OSError, ValueError):  # nobody reads standard error any more
        sys.stderr.flush()
        left = memoryview(f"{message}\n".encode(errors="backslashreplace"))
        while left:
            left = left[os.write(sys.stderr.fileno(), left) :]
