"""Show runs on a terminal until the user has seen enough, or print one frame."""

from __future__ import annotations

import contextlib
import io
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live

from megachiar.errors import UserError
from megachiar.monitoring.run_state import RunState
from megachiar.monitoring.screen import Size, footer, frame
from megachiar.monitoring.watched_run import WatchedRun

QUIT = "qQ\x03\x04"
"""Keys that end the view, beside Esc alone: with Esc begin arrow keys too, which a mouse wheel types."""
ESCAPE = "\x1b"
_HEIGHT = 24  # of a frame that is no terminal's


def print_once(runs: Sequence[WatchedRun]) -> None:
    """Print one frame on standard output.

    Raises:
        UserError: a folder is missing or cannot be read.
    """
    for run in runs:
        if not run.folder.is_dir():
            raise UserError(run.folder, "there is no such folder", "give a run folder (logging.folder of its config)")
        while run.read():
            pass
    size = shutil.get_terminal_size((80, _HEIGHT))
    _show_what_it_can(sys.stdout)
    console = Console(file=sys.stdout, width=size.columns, highlight=False)
    rows = -(-len(runs) // max(1, size.columns // 36))
    console.print(frame(runs, Size(size.columns, max(size.lines - 1, 16 * rows), _is_ascii(console))), markup=False)


def watch(runs: Sequence[WatchedRun], every: float) -> None:
    """Show the runs on the whole terminal, anew every ``every`` seconds, until ``q`` or Ctrl-C.

    Raises:
        UserError: a folder cannot be read at first. One that cannot be read later is shown as such.
    """
    _show_what_it_can(sys.stdout)
    console = Console(file=sys.stdout, highlight=False)
    live = Live(console=console, screen=True, auto_refresh=False, transient=True)
    with contextlib.suppress(KeyboardInterrupt), _ended_by_sigterm(), _keys() as pressed:
        for run in runs:
            run.read()
        _draw(runs, every, live, pressed)


def _draw(runs: Sequence[WatchedRun], every: float, live: Live, pressed: Callable[[float], str]) -> None:
    console = live.console
    with live:
        more = True
        while True:
            size = Size(console.width, console.height, _is_ascii(console))
            live.update(frame(runs, size, footer(every)), refresh=True)
            if _ends(pressed(0.0 if more else every)):
                return
            more = _read(runs)


def _read(runs: Sequence[WatchedRun]) -> bool:
    """Read what is new of every run; return whether one has more."""
    more = False
    for run in runs:
        try:
            more |= run.read()
        except UserError as error:
            run.state = RunState("not running", f"cannot be read: {error.problem}")
    return more


def can_draw() -> bool:
    """Return whether standard output is a terminal that can draw one frame over another; TERM=dumb cannot."""
    return sys.stdout.isatty() and not Console(file=sys.stdout).is_dumb_terminal


def _show_what_it_can(file: TextIO) -> None:
    """Let a sign that the encoding does not have be one question mark, so that lines stay as long as they are."""
    if isinstance(file, io.TextIOWrapper):
        file.reconfigure(errors="replace")


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as an exit does, so that the terminal gets its own screen and keys back."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ends(keys: str) -> bool:
    """Return whether ``keys``, pressed at once, end the view."""
    return keys == ESCAPE or (not keys.startswith(ESCAPE) and any(key in QUIT for key in keys))


def _is_ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def _wait(seconds: float) -> str:
    time.sleep(seconds)
    return ""


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits so many seconds for keys and returns those that were pressed, or nothing.

    Where standard input is no terminal it only waits.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        yield _wait
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> str:
        if not select.select([descriptor], [], [], seconds)[0]:
            return ""
        return os.read(descriptor, 32).decode(errors="replace") or "\x04"  # an input that has ended is no key

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
