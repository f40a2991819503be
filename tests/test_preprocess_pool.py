"""The ordered pool: order, bounded memory, errors at their place, workers that die, and no process left behind."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import time

import pytest

from megachiar.data.ordered_pool import WINDOW, WorkerError, ordered_map
from megachiar.errors import UserError


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


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order(workers):
    results = list(ordered_map(make(square_slowly_at_first), range(30), workers))
    assert results == [number * number for number in range(30)]


def test_no_items_give_no_results():
    assert list(ordered_map(make(square_slowly_at_first), [], 2)) == []


def test_large_items_and_results_pass_in_both_directions():
    items = [bytes([number]) * 3_000_000 for number in range(6)]
    assert list(ordered_map(make(bytes.upper), items, 2)) == [item.upper() for item in items]


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
def test_a_worker_that_dies_ends_the_run(function, how):
    with pytest.raises(UserError, match=how) as caught:
        list(ordered_map(make(function), range(30), 2))
    assert "fewer --workers" in caught.value.remedy


def test_a_worker_that_cannot_start_says_why():
    with pytest.raises(UserError, match="tokenizer: does not load"):
        list(ordered_map(refuse_to_start, range(30), 2))


def test_an_input_that_breaks_ends_the_run():
    def items():
        yield 1
        raise UserError("input", "truncated")

    with pytest.raises(UserError, match="input: truncated"):
        list(ordered_map(make(fail_at_seven), items(), 2))
