"""Let a run go on whose log cannot be written: its disk is full, or the reader of its pipe is gone.

In ``megachiar pretrain ... 2>&1 | tee log`` Ctrl-C ends tee as well. The run must still save and stop.
"""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO


class LossyStream:
    """A text stream that loses what the system refuses to write, and is the stream that it wraps in all else.

    Args:
        stream: to write to.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text``, or lose it; return its length."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Flush what can be written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):  # nobody will ever read it: later writes need not fail again
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lose_what_cannot_be_written() -> None:
    """Let no write to standard output or standard error of this process fail from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the program started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it stays until the process ends)
        elif not isinstance(stream, LossyStream):
            setattr(sys, name, LossyStream(stream))
