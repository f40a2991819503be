"""Signals that stop a run: the first one lets it save, and a second one ends it at once.

    signal                         while ranks meet        while the run works                a second one
    --------------------------     --------------------    -------------------------------    ---------------------
    Ctrl-C, SIGTERM, SIGHUP        ends at once            saves and stops, exit code 75      ends at once
    SIGUSR1 (a notice ahead)       ends at once            saves and stops, exit code 75      changes nothing
    SIGTSTP (Ctrl-Z, suspension)   waits for SIGCONT       waits for SIGCONT                  waits for SIGCONT

A launcher sends a signal that it gets on to its ranks, which a terminal may have sent to them too. So what comes
within ``SAME_SIGNAL_S`` counts as one. Signals that were ignored when the process started, as SIGHUP under nohup and
Ctrl-C of a job in the background, stay ignored.

Python runs handlers in the main thread alone, and never while that thread waits in C, as it does where ranks meet. So
the system writes each signal to a pipe, which a thread reads.

The thread acts on SIGTSTP before the process waits: timers of the system would end the process as soon as it goes on.
Slurm sends this signal, too, some seconds before it suspends a job.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable

from megachiar.errors import EXIT_STOPPED
from megachiar.last_words import print_last_words, write_within_limit

SAME_SIGNAL_S = 5.0
_ALWAYS = (signal.SIGTERM, signal.SIGUSR1)
_UNLESS_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGTSTP)


class StopSignals:
    """What asks this run to stop: a signal, or the end of the time that it was given.

    Attributes:
        received: the name of the first signal that asked to save and stop; None as long as there was none.
        before_suspension: is called before the process waits for SIGCONT.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.before_suspension: Callable[[], None] = lambda: None
        self._began = time.monotonic()
        self._until: float | None = None
        self._can_save = False
        self._demanded: float | None = None
        self._caught: list[signal.Signals] = []
        self._mask: set[int | signal.Signals] = set()  # of the thread that forks

    def install(self) -> None:
        """Catch the signals, before torch is imported: an uncaught SIGUSR1 in those seconds would end the rank."""
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        self._caught = [*_ALWAYS, *(n for n in _UNLESS_IGNORED if signal.getsignal(n) != signal.SIG_IGN)]
        for number in self._caught:
            signal.signal(number, _leave_it_to_the_thread)
        signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        os.register_at_fork(before=self._hold, after_in_parent=self._let_go, after_in_child=self._leave_in_child)
        threading.Thread(target=self._listen, args=[ours], name="stop signals", daemon=True).start()
        with contextlib.suppress(OSError, ValueError):  # standard error may be no file
            faulthandler.register(signal.SIGUSR2, all_threads=True)
            faulthandler.enable()  # a crash, such as SIGBUS where a dataset was cut while it is read, says where

    def remember(self) -> None:
        """Let signals ask to save and stop from now on, since the ranks have met and watch one another."""
        self._can_save = True

    def stop_after(self, seconds: float | None) -> None:
        """Ask to stop so many seconds after the start of this process; None sets no limit."""
        self._until = None if seconds is None else self._began + seconds

    def reason(self) -> str | None:
        """Return what asks this rank to stop, to be read after "stopped by"; None if nothing does."""
        if self.received is not None:
            return f"a signal ({self.received})"
        if self._until is not None and time.monotonic() >= self._until:
            return "training.stop_after"
        return None

    def ignore(self) -> None:
        """Ignore further signals while the process ends after a save."""
        for number in self._caught:
            signal.signal(number, signal.SIG_IGN)

    def _hold(self) -> None:
        """Hold signals to this thread back during a fork: a new child has the handlers and the pipe of its parent."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._caught)

    def _let_go(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _leave_in_child(self) -> None:
        """Let signals end a child, and keep them from being taken for signals to this process."""
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            signal.set_wakeup_fd(-1)
            for number in self._caught:
                signal.signal(number, signal.SIG_DFL)
        self._let_go()

    def _listen(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 64):
                if number in self._caught:
                    self._handle(signal.Signals(number))

    def _handle(self, number: signal.Signals) -> None:
        if number == signal.SIGTSTP:
            self.before_suspension()
            os.kill(os.getpid(), signal.SIGSTOP)
            return
        if not self._can_save:
            self._end("interrupted" if number == signal.SIGINT else f"stopped by {number.name} before training", number)
        if self.received is None:
            self.received = number.name
            rank = os.environ.get("RANK", "0")
            if rank == "0":
                write_within_limit(f"{number.name}: the run saves and stops\n")
        if number == signal.SIGUSR1:
            return
        now = time.monotonic()
        if self._demanded is None:
            self._demanded = now
        elif now - self._demanded > SAME_SIGNAL_S:
            self._end(f"a second signal ({number.name}): ends at once, without saving", number)

    def _end(self, why: str, number: signal.Signals) -> None:
        """End the process at once; nothing is lost before training, so that the run may be started again."""
        print_last_words(why)
        early = not self._can_save and number != signal.SIGINT
        os._exit(EXIT_STOPPED if early else 128 + number)


def _leave_it_to_the_thread(_number: int, _frame: object) -> None:
    """Let the system write the signal to the pipe, which it does only for signals with a handler."""
