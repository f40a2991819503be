"""Who hears Ctrl-C while a block runs."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupts_go_to(handler: signal.Handlers) -> Iterator[None]:
    """Give SIGINT to ``handler`` (``SIG_IGN`` or ``SIG_DFL``) while the block runs, and then back to who had it.

    Nothing changes outside the main thread, which alone may do this and gets the signal, nor in a process that was
    started with SIGINT ignored (nohup, a job in the background): whoever did that meant it.
    """
    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or before in (None, signal.SIG_IGN):  # None: a handler that Python could not put back
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
