"""Map a function over a stream with many processes, in order and with bounded memory.

    items --> [one item at each worker] --> results, held back until their turn --> caller

The standard pools do not suffice. ``Pool`` waits forever when a worker is killed. The workers of ``Pool`` and of
``ProcessPoolExecutor`` outlive a parent that is killed. Here each worker has its own pipe, so that either end sees at
once when the other is gone.

The caches of a worker's libraries and the holes in its heap are bounded too. A worker makes the function and forks a
copy of itself, which does the work. When the copy has grown by ``LARGEST_GROWTH``, it ends, and the next copy takes
over its pipe. All copies share the modules and data that the worker had loaded.
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
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar, cast

from megachiar.errors import UserError, disk_error
from megachiar.interrupts import interrupts_go_to
from megachiar.process_memory import give_back_free_memory, own_bytes

Item = TypeVar("Item")
Result = TypeVar("Result")

WINDOW = 4  # results per worker that may be under way or held back
PATIENCE = 5.0  # seconds that a worker has to end by itself
LARGEST_GROWTH = 16 << 20  # bytes that a worker's copy may grow by
OUTGROWN = 75  # exit code of a copy that has grown by more
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


class WorkerError(RuntimeError):
    """The function raised an error that is not a ``UserError``; the message holds the worker's traceback."""


class Outcome(NamedTuple):
    """Hold the result of one item, or the error that the function raised for it."""

    result: Any = None
    error: Exception | None = None


def ordered_map(
    make_function: Callable[[], Callable[[Item], Result]],
    items: Iterable[Item],
    workers: int,
    *,
    fork: bool = False,
    cache_bytes: int = 0,
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for every item, in the order of the items.

    Close the iterator (``contextlib.closing``) to stop early; no worker is left behind.

    Args:
        make_function: called once in each worker to make the function; it must be picklable unless workers are forked.
        items: the items, which are read one by one, at most ``WINDOW * workers`` ahead of the results.
        workers: the number of processes; 1 works in this process.
        fork: whether workers are copies of this process instead of fresh processes. They start at once with all that it
            has loaded, but no thread of this process may hold a lock that a worker needs.
        cache_bytes: the bytes of a cache that the function bounds itself; a copy may grow by so much more.

    Raises:
        UserError: the function raised it for the item whose turn it is, or a worker died.
        WorkerError: the function raised anything else.
    """
    if workers < 1:
        raise UserError("--workers", f"{workers} workers", "use at least 1")
    if workers == 1:
        yield from map(make_function(), items)
        return
    pool: list[_Worker] = []
    try:
        # A worker begins with Ctrl-C ignored as its parent has it, or it could die of it half-way through its imports.
        with interrupts_go_to(signal.SIG_IGN):
            for number in range(workers):
                earlier = [worker.connection for worker in pool] if fork else None
                pool.append(_Worker(make_function, number, earlier, LARGEST_GROWTH + cache_bytes))
        yield from _serve(pool, enumerate(items))
    except BaseException:
        for worker in pool:
            worker.process.kill()
        raise
    finally:
        for worker in pool:
            worker.leave()


class _Worker:
    """Hold the parent's end of one worker process.

    Args:
        make_function: makes the function in the worker.
        number: the number of the worker, for messages.
        earlier: this process's ends of the earlier workers' pipes, if workers are forked; None starts a fresh process.
        growth: the bytes that a copy may grow by.
    """

    def __init__(
        self,
        make_function: Callable[[], Callable[[Any], Any]],
        number: int,
        earlier: list[Connection] | None,
        growth: int,
    ):
        fresh = earlier is None
        context = multiprocessing.get_context("forkserver") if fresh else multiprocessing.get_context("fork")
        self.number = number
        self.connection, theirs = context.Pipe()
        inherited = None if earlier is None else [*earlier, self.connection]
        self.process = context.Process(
            target=_work, args=(make_function, theirs, inherited, growth), daemon=True, name=f"worker-{number}"
        )
        self.process.start()
        theirs.close()  # or the pipe would stay open when the worker dies

    def send(self, item: object) -> None:
        """Give the worker an item."""
        try:
            self.connection.send(item)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Outcome:
        """Wait for the outcome of the item that the worker has."""
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error

    def leave(self) -> None:
        """End the worker."""
        self.connection.close()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _death(self) -> UserError:
        """Return the error for a worker that died, which says how."""
        self.process.join(PATIENCE)
        code = self.process.exitcode
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with code {code}"
        return UserError(
            f"worker {self.number} (process {self.process.pid})",
            f"{how} in the middle of its work",
            "if memory ran out, use fewer --workers or a machine with more; nothing was written",
        )


def _serve(pool: list[_Worker], numbered: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    """Keep every worker busy, and yield the results in order."""
    idle = list(pool)
    busy: dict[Connection, tuple[_Worker, int]] = {}
    outcomes: dict[int, Outcome] = {}
    sent, given, exhausted = 0, 0, False
    while True:
        while idle and not exhausted and sent - given < WINDOW * len(pool):
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
                worker, number = busy.pop(cast(Connection, connection))
                outcomes[number] = worker.receive()
                idle.append(worker)


def _unwrap(outcome: Outcome) -> Any:
    """Return the result, or raise the error."""
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


def _work(
    make_function: Callable[[], Callable[[Any], Any]],
    connection: Connection,
    inherited: list[Connection] | None,
    growth: int,
) -> None:
    """Work in a worker process until its parent closes the pipe or dies.

    Args:
        make_function: makes the function.
        connection: the worker's end of its pipe.
        inherited: the parent's ends of pipes that a forked worker has inherited; None in a fresh process.
        growth: the bytes that a copy may grow by.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    if inherited is not None:
        _close_inherited(inherited)
    try:
        function = make_function()
    except Exception as error:
        function = functools.partial(_raise, _picklable(error))
    gc.freeze()  # or each copy's first collection would write to, and so duplicate, all that it shares
    give_back_free_memory()
    while (code := _end_of_copy(function, connection, growth)) == OUTGROWN:
        pass
    if code < 0:
        os.kill(os.getpid(), -code)  # so that the parent sees how the copy died
    os._exit(code)


def _end_of_copy(function: Callable[[Any], Any], connection: Connection, growth: int) -> int:
    """Fork a copy that works until it has grown too much or the pipe closes; return its exit code, -N for signal N."""
    worker = os.getpid()
    copy = os.fork()
    if copy:
        return os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
    code = 1
    try:
        _die_with_parent(worker)
        code = OUTGROWN if _serve_pipe(function, connection, growth) else 0
    finally:
        os._exit(code)


def _serve_pipe(function: Callable[[Any], Any], connection: Connection, growth: int) -> bool:
    """Work on the items of the pipe until it is closed (returns False) or this process has grown too much (True)."""
    began = own_bytes()
    with contextlib.suppress(EOFError, OSError):
        while not _has_outgrown(began, growth):
            item = connection.recv()
            try:
                outcome = Outcome(result=function(item))
            except Exception as error:
                outcome = Outcome(error=_picklable(error))
            connection.send(outcome)
            del item, outcome
        return True
    return False


def _has_outgrown(began: int, growth: int) -> bool:
    """Return whether this process, which began with ``began`` bytes, has grown too much, by more than can be freed."""
    if own_bytes() - began <= growth:
        return False
    give_back_free_memory()
    return own_bytes() - began > growth - LARGEST_GROWTH // 2


def _die_with_parent(parent: int) -> None:
    """Have the system kill this process with its parent; a system that cannot leaves it to the closed pipe."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before
        os._exit(1)


def _raise(error: Exception, _item: object) -> None:
    """Stand in for a function that could not be made."""
    raise error


def _close_inherited(inherited: list[Connection]) -> None:
    """Close the pipes and files that belong to the parent alone.

    A pipe that is open here would hide the parent's death from its other workers. A file that is open here would stay
    locked after the parent's death, against the run that continues.
    """
    for connection in inherited:
        connection.close()
    for descriptor in map(int, os.listdir("/dev/fd")):
        with contextlib.suppress(OSError):  # the descriptor of the list itself is closed by now
            if descriptor > 2 and stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)


def _picklable(error: Exception) -> Exception:
    """Return an error that survives the pipe: a ``UserError``, made of a disk's error too, or the traceback."""
    if isinstance(error, OSError):
        return disk_error("a worker", error, "read or write")
    if isinstance(error, UserError):
        with contextlib.suppress(Exception):
            return pickle.loads(pickle.dumps(error))
    return WorkerError(f"a worker failed:\n{traceback.format_exc()}")
