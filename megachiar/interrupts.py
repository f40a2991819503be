"""A block can ignore Ctrl-C, or give it back to the system."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupts_go_to(handler: signal.Handlers) -> Iterator[None]:
    """Handle SIGINT by ``handler`` (``SIG_IGN`` or ``SIG_DFL``) in this block, and by the earlier handler after it.

    Nothing changes outside the main thread, since only the main thread may set a handler and receives the signal.
    Nothing changes either in a process that was started with SIGINT ignored, as by nohup or in the background.
    """
    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or before in (None, signal.SIG_IGN):  # None is a handler that Python could not set again
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
