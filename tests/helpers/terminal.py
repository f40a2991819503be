"""A program on a pseudo-terminal of this machine, and what a person would see on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator

import pyte
from support import ROOT, heed_ctrl_c, process_environment


class Terminal:
    """A running program and its screen.

    Attributes:
        process: the program.
        screen: what it has drawn, as ``pyte`` reads it.
    """

    def __init__(self, process: subprocess.Popen[bytes], master: int, columns: int, lines: int):
        self.process, self._master = process, master
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.written = b""

    @property
    def lines(self) -> list[str]:
        """The lines of the screen without spaces at their ends."""
        return [line.rstrip() for line in self.screen.display]

    @property
    def text(self) -> str:
        """All lines of the screen."""
        return "\n".join(self.lines)

    def wait_for(self, *wanted: str | Callable[[str], bool], seconds: float = 120.0) -> str:
        """Return the screen as soon as it shows all of ``wanted`` at once; one that never does fails the test.

        A frame comes in several parts, so that what is read together has to be waited for together.
        """
        shown = [(lambda text, part=part: part in text) if isinstance(part, str) else part for part in wanted]
        until = time.monotonic() + seconds
        while not all(shows(self.text) for shows in shown):
            assert time.monotonic() < until, f"not seen: {wanted}\n{self.text}"
            assert self._read(until - time.monotonic()), f"the program has ended without showing {wanted}\n{self.text}"
        return self.text

    def type(self, keys: str) -> None:
        """Type on its keyboard."""
        os.write(self._master, keys.encode())

    def end(self, seconds: float = 60.0) -> int:
        """Read until the program has ended, and return its exit code."""
        until = time.monotonic() + seconds
        while self._read(max(0.0, until - time.monotonic())):
            assert time.monotonic() < until, "the program does not end"
        return self.process.wait(seconds)

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size, as dragging a window does."""
        _set_size(self._master, columns, lines)
        self.screen.resize(lines, columns)

    def _read(self, seconds: float) -> bool:
        """Read what the program writes within so many seconds; return False at its end."""
        if not select.select([self._master], [], [], seconds)[0]:
            return True
        try:
            content = os.read(self._master, 1 << 16)
        except OSError:  # Linux says so when nobody holds the other end
            return False
        self.written += content
        self._stream.feed(content)
        return bool(content)


@contextlib.contextmanager
def on_terminal(*arguments: str, columns: int = 80, lines: int = 24, **env: str) -> Iterator[Terminal]:
    """Run ``python ARGUMENTS`` on a terminal of this size; it is killed at the end of the block."""
    master, slave = pty.openpty()
    _set_size(slave, columns, lines)
    environment = {**process_environment(TERM="xterm-256color", LC_ALL="C.UTF-8", PYTHONUTF8="1"), **env}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: (fcntl.ioctl(0, termios.TIOCSCTTY, 0), heed_ctrl_c())[0],  # Ctrl-C reaches who has it
    )
    os.close(slave)
    try:
        yield Terminal(process, master, columns, lines)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def _set_size(descriptor: int, columns: int, lines: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
