"""Map a function over a stream with many processes: results in order, memory bounded, and never a hang.

    items --> [one in the hands of each worker] --> results, held back until their turn --> caller

The standard pools do not do: ``Pool`` waits for ever when a worker is killed, and the workers of both it and
``ProcessPoolExecutor`` outlive a parent that is killed. Here each worker hangs on a pipe of its own, so that either end
sees at once when the other is gone.

What a worker's libraries remember and what its heap has of holes ends with it: a worker makes the function and forks a
copy of itself that works; when the copy has grown by ``LARGEST_GROWTH``, the next one takes over its pipe. All copies
share what the worker had loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import multiprocessing
import os
import pickle
import signal
import stat
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

from megachiar.errors import UserError, disk_error
from megachiar.interrupts import interrupts_go_to
from megachiar.process_memory import give_back_free_memory, own_bytes

Item = TypeVar("Item")
Result = TypeVar("Result")

WINDOW = 4  # results per worker that may be under way or held back
PATIENCE = 5.0  # seconds a worker has to go away by itself
LARGEST_GROWTH = 16 << 20  # bytes that a worker's copy may grow by
OUTGROWN = 75  # exit code of a copy that has
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


class WorkerError(RuntimeError):
    """The function raised something that is not a ``UserError``; holds the worker's traceback."""


class Outcome(NamedTuple):
    """What became of one item: a result, or the error that stands in its place."""

    result: Any = None
    error: Exception | None = None


def ordered_map(
    make_function: Callable[[], Callable[[Item], Result]],
    items: Iterable[Item],
    workers: int,
    *,
    fork: bool = False,
    remembers: int = 0,
) -> Iterator[Result]:
    """``function(item)`` for every item, in the order of the items.

    Close the iterator (``contextlib.closing``) to stop early; no worker is left behind.

    Args:
        make_function: called once in each worker to make the function; picklable, unless workers are forked.
        items: read one by one, at most ``WINDOW * workers`` ahead of the results.
        workers: processes; 1 works in this process.
        fork: workers are copies of this process, there at once with all that it has loaded, instead of fresh ones. Only
            for a process none of whose threads may hold a lock that a worker needs.
        remembers: bytes that the function keeps on purpose and bounds itself: a copy may grow by so much more.

    Raises:
        UserError: the function raised it for the item whose turn it is, or a worker died.
        WorkerError: the function raised anything else.
    """
    if workers < 1:
        raise UserError("--workers", f"{workers} workers", "use at least 1")
    if workers == 1:
        yield from map(make_function(), items)
        return
    crew: list[_Worker] = []
    try:
        # A worker begins with Ctrl-C ignored as its parent has it, or it could die of it half-way through its imports.
        with interrupts_go_to(signal.SIG_IGN):
            for number in range(workers):
                earlier = [worker.connection for worker in crew] if fork else None
                crew.append(_Worker(make_function, number, earlier, LARGEST_GROWTH + remembers))
        yield from _serve(crew, enumerate(items))
    except BaseException:
        for worker in crew:
            worker.process.kill()
        raise
    finally:
        for worker in crew:
            worker.leave()


class _Worker:
    """The parent's end of one worker process."""

    def __init__(
        self, make_function: Callable[[], Callable], number: int, earlier: list[Connection] | None, growth: int
    ):
        """
        Args:
            earlier: this process's ends of the pipes so far, if workers are forked; None begins a fresh process.
            growth: bytes that a copy may grow by.
        """
        context = multiprocessing.get_context("forkserver" if earlier is None else "fork")
        self.number = number
        self.connection, theirs = context.Pipe()
        inherited = None if earlier is None else [*earlier, self.connection]
        self.process = context.Process(
            target=_work, args=(make_function, theirs, inherited, growth), daemon=True, name=f"worker-{number}"
        )
        self.process.start()
        theirs.close()  # or the pipe would stay open when the worker dies

    def send(self, item: object) -> None:
        try:
            self.connection.send(item)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Outcome:
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error

    def leave(self) -> None:
        self.connection.close()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _death(self) -> UserError:
        self.process.join(PATIENCE)
        code = self.process.exitcode
        killed = code is not None and code < 0
        how = f"was killed by {signal.Signals(-code).name}" if killed else f"ended with code {code}"
        return UserError(
            f"worker {self.number} (process {self.process.pid})",
            f"{how} in the middle of its work",
            "if memory ran out, use fewer --workers or a machine with more; nothing was written",
        )


def _serve(crew: list[_Worker], numbered: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """Keep every worker busy and give the results in order."""
    idle, busy = list(crew), {}
    outcomes: dict[int, Outcome] = {}
    sent, given, exhausted = 0, 0, False
    while True:
        while idle and not exhausted and sent - given < WINDOW * len(crew):
            entry = next(numbered, None)
            if entry is None:
                exhausted = True
            else:
                worker = idle.pop()
                worker.send(entry[1])
                busy[worker.connection] = (worker, entry[0])
                sent += 1
        if given in outcomes:
            yield _unwrap(outcomes.pop(given))
            given += 1
        elif given == sent:
            return
        else:
            for connection in wait(list(busy)):
                worker, number = busy.pop(connection)
                outcomes[number] = worker.receive()
                idle.append(worker)


def _unwrap(outcome: Outcome) -> Any:
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def _work(
    make_function: Callable[[], Callable], connection: Connection, inherited: list[Connection] | None, growth: int
) -> None:
    """A worker's life: until its parent closes the pipe, by will or by death.

    ``inherited``: the parent's ends of pipes that a forked worker came with.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    if inherited is not None:
        _let_go(inherited)
    try:
        function = make_function()
    except Exception as error:
        function = functools.partial(_raise, _portable(error))
    gc.freeze()  # or each copy's first collection would write to, and so duplicate, all that it shares with the others
    give_back_free_memory()
    while (code := _end_of_copy(function, connection, growth)) == OUTGROWN:
        pass
    if code < 0:
        os.kill(os.getpid(), -code)  # the parent is told how the copy died
    os._exit(code)


def _end_of_copy(function: Callable, connection: Connection, growth: int) -> int:
    """Exit code of a copy of this process that works until it is outgrown or the pipe is closed; -N for signal N."""
    worker = os.getpid()
    copy = os.fork()
    if copy:
        return os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
    code = 1
    try:
        _die_with(worker)
        code = OUTGROWN if _serve_pipe(function, connection, growth) else 0
    finally:
        os._exit(code)


def _serve_pipe(function: Callable, connection: Connection, growth: int) -> bool:
    """Do what comes through the pipe, until it is closed (False) or this process has outgrown its bounds (True)."""
    began = own_bytes()
    with contextlib.suppress(EOFError, OSError):
        while not _has_outgrown(began, growth):
            item = connection.recv()
            try:
                outcome = Outcome(result=function(item))
            except Exception as error:
                outcome = Outcome(error=_portable(error))
            connection.send(outcome)
            del item, outcome
        return True
    return False


def _has_outgrown(began: int, growth: int) -> bool:
    """Whether this process, which began with so many bytes, has grown beyond its bounds, by more than can be freed."""
    if own_bytes() - began <= growth:
        return False
    give_back_free_memory()
    return own_bytes() - began > growth - LARGEST_GROWTH // 2


def _die_with(parent: int) -> None:
    """Be killed when the parent is, where the system can do it; elsewhere the closed pipe tells, after the item."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


def _raise(error: Exception, _item: object) -> None:
    raise error


def _let_go(inherited: list[Connection]) -> None:
    """Close what belongs to the parent alone.

    A pipe held open here would hide the parent's death from its other workers, and an open file would stay locked after
    it, against the run that goes on.
    """
    for connection in inherited:
        connection.close()
    for descriptor in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):  # the list's own is gone
            if descriptor > 2 and stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)


def _portable(error: Exception) -> Exception:
    """``error`` if it survives the pipe, what a disk refuses as its message, else one that tells its traceback."""
    if isinstance(error, OSError):
        return disk_error("a worker", error, "read or write")
    if isinstance(error, UserError):
        with contextlib.suppress(Exception):
            return pickle.loads(pickle.dumps(error))
    return WorkerError(f"a worker failed:\n{traceback.format_exc()}")
