"""Print a message that several processes of one machine have only once, and never not at all.

    lock the notes -> is the message noted, and younger than this process? -> print it and note it -> unlock

The notes are one small file of each user in the temporary folder. A process that is killed before it notes the message
leaves the lock to the next one, which prints the message. Where the notes cannot be used, every process prints.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SECONDS_FOR_THE_LOCK = 2.0
SECONDS_KEPT = 3600.0


def print_once(message: str, start: str, since: float | None, show: Callable[[], None]) -> None:
    """Call ``show`` unless another process of the same start of a program has shown ``message`` on this machine.

    Args:
        message: that ``show`` prints.
        start: text that the processes of one start have in common, and no others of this user at the same time.
        since: when this process started, by ``seconds_since_boot``. Older notes belong to an earlier start. None where
            the system does not tell; then the message is shown.
        show: prints the message.
    """
    digest = hashlib.sha256(f"{start}\n{message}".encode()).hexdigest()
    with _locked_notes() as notes:
        known = _read(notes) if notes is not None else []
        if since is not None and any(noted == digest and when >= since for when, noted in known):
            return
        show()
        if notes is not None and since is not None:
            _write(notes, [*known, (seconds_since_boot(), digest)])


def seconds_since_boot() -> float:
    """Return the time by the clock that the system counts the starts of processes by."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))  # macOS has the second one alone


def notes_path() -> Path:
    """Return the file of this user's notes."""
    return Path(tempfile.gettempdir()) / f"megachiar-messages-{os.getuid()}"


@contextlib.contextmanager
def _locked_notes() -> Iterator[int | None]:
    """Open and lock the notes; None if they are no file of this user, or another process does not let go of them."""
    try:
        notes = os.open(notes_path(), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError:
        yield None
        return
    try:
        yield notes if _is_own_file(notes) and _lock(notes) else None
    finally:
        os.close(notes)  # lets go of the lock


def _is_own_file(descriptor: int) -> bool:
    found = os.fstat(descriptor)
    return found.st_uid == os.getuid() and stat.S_ISREG(found.st_mode)


def _lock(descriptor: int) -> bool:
    until = time.monotonic() + SECONDS_FOR_THE_LOCK
    while time.monotonic() < until:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(0.02)
    return False


def _read(notes: int) -> list[tuple[float, str]]:
    """Return time and digest of each note that is not too old."""
    known, now = [], seconds_since_boot()
    with contextlib.suppress(OSError):
        for line in os.pread(notes, os.fstat(notes).st_size, 0).decode(errors="replace").splitlines():
            when, _, digest = line.partition(" ")
            with contextlib.suppress(ValueError):
                known.append((float(when), digest))
    return [note for note in known if 0 <= now - note[0] < SECONDS_KEPT]


def _write(notes: int, known: list[tuple[float, str]]) -> None:
    with contextlib.suppress(OSError):  # a full disk: the next process prints the message as well
        os.ftruncate(notes, 0)
        os.pwrite(notes, "".join(f"{when} {digest}\n" for when, digest in known).encode(), 0)
