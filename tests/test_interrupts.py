"""Ctrl-C is given away for a block and comes back, and is left alone where it is somebody else's to decide."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from megachiar.interrupts import interrupts_go_to


@pytest.fixture(autouse=True)
def python_handles_interrupts() -> Iterator[None]:
    """Tests that were started in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def current() -> object:
    return signal.getsignal(signal.SIGINT)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_the_handler_holds_for_the_block_alone(handler):
    with interrupts_go_to(handler):
        assert current() is handler
    assert current() is signal.default_int_handler
    with pytest.raises(RuntimeError), interrupts_go_to(handler):
        raise RuntimeError
    assert current() is signal.default_int_handler


def test_a_process_that_was_told_to_ignore_it_goes_on_ignoring_it():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_go_to(signal.SIG_DFL):
        assert current() is signal.SIG_IGN
    assert current() is signal.SIG_IGN


def test_another_thread_changes_nothing_and_works():
    seen = []

    def work() -> None:
        with interrupts_go_to(signal.SIG_DFL):
            seen.append(current())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
