"""Show runs on a terminal until the user has seen enough, or print one frame."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live

from megachiar.errors import UserError
from megachiar.monitoring.run_state import RunState
from megachiar.monitoring.screen import Size, footer, frame
from megachiar.monitoring.watched_run import WatchedRun

QUIT = ("q", "Q", "\x1b", "\x03", "\x04")
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
    console = Console(file=sys.stdout, width=size.columns, highlight=False)
    rows = -(-len(runs) // max(1, size.columns // 36))
    console.print(frame(runs, Size(size.columns, max(size.lines - 1, 16 * rows), _is_ascii(console))), markup=False)


def watch(runs: Sequence[WatchedRun], every: float) -> None:
    """Show the runs on the whole terminal, anew every ``every`` seconds, until ``q`` or Ctrl-C.

    Raises:
        UserError: a folder cannot be read at first. One that cannot be read later is shown as such.
    """
    console = Console(file=sys.stdout, highlight=False)
    for run in runs:
        run.read()
    live = Live(console=console, screen=True, auto_refresh=False, transient=True)
    with contextlib.suppress(KeyboardInterrupt), _keys() as pressed, live:
        more = True
        while True:
            size = Size(console.width, console.height, _is_ascii(console))
            live.update(frame(runs, size, footer(every)), refresh=True)
            if pressed(0.0 if more else every) in QUIT:
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


def _is_ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def _wait(seconds: float) -> str:
    time.sleep(seconds)
    return ""


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits so many seconds for a key and returns it, or nothing.

    Where standard input is no terminal it only waits.
    """
    if not sys.stdin.isatty():
        yield _wait
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> str:
        if not select.select([descriptor], [], [], seconds)[0]:
            return ""
        return os.read(descriptor, 32).decode(errors="replace")[:1] or "\x04"  # an input that has ended is no key

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
