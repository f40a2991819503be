"""The ordered pool: order, bounded memory, errors at their place, workers that die, and no process left behind."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from megachiar.data.preprocessing.ordered_pool import LARGEST_GROWTH, WINDOW, WorkerError, ordered_map
from megachiar.data.storage.writer import open_locked
from megachiar.errors import UserError
from megachiar.process_memory import own_bytes


def make(function):
    """What makes ``function`` in a worker; picklable."""
    return functools.partial(_same, function)


def _same(function):
    return function


def square_slowly_at_first(number: int) -> int:
    time.sleep(0.05 if number % 5 == 0 else 0)
    return number * number


def fail_at_seven(number: int) -> int:
    if number == 7:
        raise UserError("line 7", "seven is not allowed", "leave it out")
    return number


def break_at_seven(number: int) -> int:
    return 1 // (7 - number)


def die_at_seven(number: int) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def exit_at_seven(number: int) -> int:
    if number == 7:
        os._exit(3)
    return number


def refuse_to_start():
    raise UserError("tokenizer", "does not load")


kept: list[bytes] = []


def remember_a_megabyte(number: int) -> tuple[int, int, int]:
    kept.append(os.urandom(1 << 20))
    return os.getpid(), os.getppid(), own_bytes()


def forget_twenty_megabytes(number: int) -> int:
    os.urandom(20 << 20)
    return os.getpid()


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    assert multiprocessing.active_children() == []


@pytest.fixture(params=[False, True], ids=["fresh", "forked"])
def fork(request) -> bool:
    return request.param


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order(workers, fork):
    results = list(ordered_map(make(square_slowly_at_first), range(30), workers, fork=fork))
    assert results == [number * number for number in range(30)]


def test_no_items_give_no_results():
    assert list(ordered_map(make(square_slowly_at_first), [], 2)) == []


def test_large_items_and_results_pass_in_both_directions(fork):
    items = [bytes([number]) * 3_000_000 for number in range(6)]
    assert list(ordered_map(make(bytes.upper), items, 2, fork=fork)) == [item.upper() for item in items]


def test_items_are_read_only_a_little_ahead():
    taken = 0

    def items():
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    results = ordered_map(make(fail_at_seven), items(), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert taken <= 3 + 2 * WINDOW
    results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_when_it_is_its_turn(workers):
    seen = []
    with pytest.raises(UserError, match="line 7: seven is not allowed") as caught:
        for result in ordered_map(make(fail_at_seven), range(30), workers):
            seen.append(result)
    assert seen == list(range(7))
    assert caught.value.remedy == "leave it out"


def test_a_defect_keeps_its_traceback():
    with pytest.raises(WorkerError, match=r"(?s)Traceback.*break_at_seven.*ZeroDivisionError"):
        list(ordered_map(make(break_at_seven), range(30), 2))


@pytest.mark.parametrize(
    ("function", "how"), [(die_at_seven, "was killed by SIGKILL"), (exit_at_seven, "ended with code 3")]
)
def test_a_worker_that_dies_ends_the_run(function, how, fork):
    with pytest.raises(UserError, match=how) as caught:
        list(ordered_map(make(function), range(30), 2, fork=fork))
    assert "fewer --workers" in caught.value.remedy


def test_a_worker_that_cannot_start_says_why(fork):
    with pytest.raises(UserError, match="tokenizer: does not load"):
        list(ordered_map(refuse_to_start, range(30), 2, fork=fork))


def test_an_input_that_breaks_ends_the_run():
    def items():
        yield 1
        raise UserError("input", "truncated")

    with pytest.raises(UserError, match="input: truncated"):
        list(ordered_map(make(fail_at_seven), items(), 2))


def test_forked_workers_have_what_this_process_has_loaded():
    """Nothing is pickled: a function that lives nowhere but in this process is there."""
    loaded = {"factor": 3}
    assert list(ordered_map(lambda: lambda n: n * loaded["factor"], range(8), 2, fork=True)) == list(range(0, 24, 3))


def test_forked_workers_let_go_of_files_and_pipes_of_a_parent_that_is_killed(tmp_path):
    """All end at once, though each came with its parent's ends of the pipes so far; and no lock outlives the parent."""
    program = (
        "import os, sys, time\n"
        "from megachiar.data.storage.writer import open_locked\n"
        "from megachiar.data.preprocessing.ordered_pool import ordered_map\n"
        "from pathlib import Path\n"
        "held = open_locked(Path(sys.argv[1]))\n"
        "def work(n):\n    os.write(1, b'%d\\n' % os.getpid())\n    time.sleep(0.1)\n    return n\n"
        "for n in ordered_map(lambda: work, iter(int, 1), 3, fork=True):\n    pass\n"
    )
    locked = tmp_path / "locked"
    process = subprocess.Popen([sys.executable, "-c", program, str(locked)], stdout=subprocess.PIPE, text=True)
    workers: set[int] = set()
    while len(workers) < 3:
        workers.add(int(process.stdout.readline()))
    with pytest.raises(UserError, match="another process is writing"):
        open_locked(locked)
    family = [psutil.Process(pid) for pid in workers]
    process.kill()
    process.wait()
    open_locked(locked).close()  # at once, while workers may still be at work
    process.stdout.read()  # to its end: all that could write to it are gone
    process.stdout.close()
    left = psutil.wait_procs(family, timeout=20)[1]  # a process closes its files a moment before it is gone
    assert all(worker.status() == psutil.STATUS_ZOMBIE for worker in left)  # nobody may be there to bury it


@pytest.mark.skipif(own_bytes() == 0, reason="the system does not tell memory")
def test_what_a_worker_remembers_is_bounded(fork):
    """A copy that has outgrown its bounds is followed by one that has what the worker had loaded, and no more."""
    results = list(ordered_map(make(remember_a_megabyte), range(100), 2, fork=fork))
    copies, workers, held = (set(column) for column in zip(*results, strict=True))
    assert len(workers) == 2 and 100 / 20 <= len(copies) <= 2 + 100 / 8
    assert max(held) - min(held) < LARGEST_GROWTH + (6 << 20)


def test_memory_that_can_be_given_back_is_no_reason_for_another_copy(fork):
    assert len(set(ordered_map(make(forget_twenty_megabytes), range(20), 2, fork=fork))) <= 2
