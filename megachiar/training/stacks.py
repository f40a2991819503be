"""Write the Python stacks of all threads of a rank to a file of the run folder, at any time.

    RUN/stacks/rank_00003.txt     what rank 3 wrote; before each dump a line with time, process, activity and reason
    RUN/stacks/request            `megachiar stacks RUN` asks all ranks to write by it

The stacks are written by ``faulthandler``, in C: also while the main thread is stuck in a collective or in a loop.
SIGUSR2 makes one rank write. A rank that holds the interpreter's lock for too long, so that not even its watch runs,
is written and ended by a timer of the system that the watch winds up again and again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import secrets
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TextIO

from megachiar.data.storage.regular_file import check_regular, read_regular

FOLDER = "stacks"
_REQUEST = "request"
_TOKEN_BYTES = 6
_TOKEN = re.compile(rb"[0-9a-f]{%d}" % (2 * _TOKEN_BYTES))


def stack_path(run: Path, rank: int) -> Path:
    """Return the file that a rank of a run writes its stacks to."""
    return run / FOLDER / f"rank_{rank:05d}.txt"


def request_stacks(run: Path) -> str:
    """Ask all ranks of the run that works in the folder ``run`` for their stacks.

    Returns:
        The token that stands in the line before each dump that answers this request.
    """
    token = secrets.token_hex(_TOKEN_BYTES)
    path = run / FOLDER / _REQUEST
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{_REQUEST}.{token}")
    temporary.write_text(token)
    os.replace(temporary, path)
    return token


def remove_request(run: Path, token: str) -> None:
    """Remove a request that was answered, unless a later one has replaced it."""
    path = run / FOLDER / _REQUEST
    with contextlib.suppress(OSError):
        if read_request(run) == token:
            path.unlink()
        path.parent.rmdir()  # refused unless it is empty


def read_request(run: Path) -> str:
    """Return the token of the newest request; empty if there is none, or the file holds something else."""
    try:
        token = read_regular(run / FOLDER / _REQUEST, limit=_TOKEN_BYTES * 2)
    except OSError:
        return ""
    return token.decode() if _TOKEN.fullmatch(token) else ""


class StackWriter:
    """Writes this rank's stacks to its file in the run folder, or to standard error where there is none.

    Attributes:
        run: the run folder; None as long as it is not known.
    """

    def __init__(self, rank: int):
        self.run: Path | None = None
        self._rank = rank
        self._file: TextIO = sys.stderr
        self._path: Path | None = None

    def open(self) -> None:
        """Open the file, which SIGUSR2 needs beforehand; a folder that refuses leaves standard error."""
        if self.run is None or self._path is not None:
            return
        path = stack_path(self.run, self._rank)
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            if path.exists():
                check_regular(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (signals write to it until the process ends)
            self._path = path
            faulthandler.register(signal.SIGUSR2, self._file, all_threads=True)

    def write(self, doing: str, reason: str) -> None:
        """Write the stacks of all threads, below a line that says when, who, what this rank does and why it writes."""
        self.open()
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        with contextlib.suppress(OSError, ValueError):
            self._file.write(f"\n== {now}, rank {self._rank} (process {os.getpid()}) {doing} [{reason}]\n")
            self._file.flush()
            faulthandler.dump_traceback(self._file, all_threads=True)
            self._file.write("== end\n")
            self._file.flush()

    def write_failure(self, error: BaseException) -> None:
        """Write where the main thread waited in vain: it has left that place when all stacks are written."""
        self.open()
        with contextlib.suppress(OSError, ValueError):
            self._file.write(f"\n== rank {self._rank} (process {os.getpid()}) waited in vain\n")
            traceback.print_exception(error, file=self._file)
            self._file.write("== end\n")
            self._file.flush()

    def wind_up(self, seconds: float) -> None:
        """Let the system write the stacks and end the process in so many seconds, unless this is called again."""
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._file)

    def hold_timer(self) -> None:
        """Let the system not end the process until ``wind_up`` is called again."""
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Write no longer to the run folder, and remove a file that holds nothing."""
        faulthandler.cancel_dump_traceback_later()
        if self._path is None:
            return
        faulthandler.register(signal.SIGUSR2, sys.stderr, all_threads=True)
        self._file.close()
        self._file = sys.stderr
        with contextlib.suppress(OSError):
            if self._path.stat().st_size == 0:
                self._path.unlink()
            self._path.parent.rmdir()  # refused unless it is empty
