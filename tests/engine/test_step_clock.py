"""The time of a step is split by the host's clock on a CPU, and by events that nobody waits for on a GPU."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from megachiar.engine.step_clock import EventClock, StepClock, step_clock


def test_phases_of_the_host_are_apart_from_their_communication():
    clock = StepClock()
    with clock.communicating():  # before a step: it is a save's
        time.sleep(0.05)
    for _ in range(2):
        clock.begin_step()
        for _item in clock.reading(iter([1, 2])):
            with clock.phase("forward"):
                time.sleep(0.01)
                with clock.communicating():
                    time.sleep(0.02)
        clock.end_step()
    taken = clock.take()
    assert taken["forward"] == pytest.approx(0.02, abs=0.015)
    assert taken["communication"] == pytest.approx(0.04, abs=0.02)
    assert taken["data"] < 0.01 and taken["backward"] == taken["optimizer"] == 0.0
    assert set(clock.take().values()) == {None}, "no step since"


def test_what_a_pipeline_cannot_tell_is_none():
    clock = step_clock(torch.device("cpu"), stages=2)
    clock.begin_step()
    assert list(clock.reading(iter([1]))) == [1]
    with clock.communicating():
        pass
    clock.end_step()
    taken = clock.take()
    assert taken["data"] >= 0 and taken["communication"] >= 0
    assert taken["forward"] is taken["backward"] is taken["optimizer"] is None


class Stream:
    """A stream whose time the test moves on, and which has done what was put in up to ``done``."""

    def __init__(self):
        self.now, self.done = 0.0, -1.0

    def event(self) -> Event:
        return Event(self)


class Event:
    def __init__(self, stream: Stream):
        self.stream = stream

    def record(self) -> None:
        self.at = self.stream.now

    def query(self) -> bool:
        return self.at <= self.stream.done

    def elapsed_time(self, end: Event) -> float:
        assert self.query() and end.query(), "the host would wait"
        return 1000 * (end.at - self.at)


def test_events_are_read_when_they_are_done_and_not_before():
    stream = Stream()
    here, beside = object(), object()
    current = [here]
    clock = EventClock(new_event=stream.event, stream=lambda: current[0])

    def step() -> None:
        clock.begin_step()
        with clock.phase("forward"):
            stream.now += 2
            with clock.communicating():
                stream.now += 3
            current[0] = beside
            with clock.communicating():  # on a stream of its own
                stream.now += 1
            current[0] = here
        with clock.phase("backward"):
            stream.now += 4
            worker = threading.Thread(target=communicate, name="megachiar-save")
            worker.start()
            worker.join()
        clock.end_step()

    def communicate() -> None:
        with clock.communicating():
            pass

    step()
    first = stream.now
    assert set(clock.take().values()) == {None}, "the stream has not come to its events yet"
    stream.done = first
    step()
    taken = clock.take()
    assert taken == {"data": 0, "forward": 3, "backward": 4, "optimizer": 0, "communication": 3}
    stream.done = stream.now
    step()
    assert clock.take()["backward"] == 4
