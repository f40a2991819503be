"""Count what a call makes a GPU do, by torch's profiler: launches, kernels, and the time that each side works.

    host   |launch launch launch|-- waits: for a copy back --|launch launch|-- waits for the end --|
    GPU           |kernel kernel|kernel|---- idle ----|copy|   |kernel kernel|

``launches`` counts the host's calls: a CUDA graph of a hundred kernels is one. ``kernels`` counts what the GPU runs.
The profiler costs the host some microseconds a launch, so ``host_seconds`` is an upper bound.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from megachiar.benchmark import synchronise

_LAUNCH = re.compile(r"(cuda|cu|hip)\w*Launch\w*")
_WAIT = re.compile(r"(cuda|cu|hip)\w*Synchronize\w*")
_TO_PAGEABLE = "-> Pageable"
"""Part of the name of a copy that the host waits for within the call that starts it."""
_CALLS_ON_GPU = 3
"""A CPU needs one, since operations alone are counted there."""
_CLOCKS_APART_S = 0.002
"""More than the profiler's clock and the host's can differ by."""


class Activity(NamedTuple):
    """What one call does, as the mean over several. What the device does not have is None.

    Attributes:
        operations: calls of aten operations, those within others included; on a CPU.
        launches: calls of the host that start kernels or graphs of a GPU.
        kernels: kernels, copies and fills that the GPU runs.
        busy_seconds: time in which the GPU runs at least one of them.
        waits: calls in which the host waits for the GPU.
        host_seconds: time that the host needs besides.
    """

    operations: float | None = None
    launches: float | None = None
    kernels: float | None = None
    busy_seconds: float | None = None
    waits: float | None = None
    host_seconds: float | None = None


def measure_activity(call: Callable[[], object], device: torch.device) -> Activity:
    """Profile some calls of ``call``, which is warm already, on ``device``."""
    is_gpu = device.type == "cuda"
    calls = _CALLS_ON_GPU if is_gpu else 1
    synchronise(device)
    with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as profiler:
        began = time.time_ns()
        for _ in range(calls):
            call()
        ended = time.time_ns()
        time.sleep(_CLOCKS_APART_S)  # so that the wait below is told from the calls' own
        synchronise(device)
    events = profiler.profiler.kineto_results.events()
    return gpu_activity(events, began, ended, calls) if is_gpu else cpu_activity(events)


def cpu_activity(events: Iterable[Any]) -> Activity:
    """Return the activity that the profiler's events of one call on a CPU show."""
    return Activity(operations=sum(event.name().startswith("aten::") for event in events))


def gpu_activity(events: Iterable[Any], began: int, ended: int, calls: int) -> Activity:
    """Return the activity that the profiler's events of a GPU show.

    Args:
        events: of the host's calls of the driver, and of what the GPU ran.
        began, ended: when the calls were made by the host's clock, in ns.
        calls: how many there were.
    """
    cuda = torch.autograd.DeviceType.CUDA
    events = list(events)
    on_gpu = [event for event in events if event.device_type() == cuda]
    of_host = [event for event in events if event.device_type() != cuda and event.start_ns() < ended]
    blocking = {event.correlation_id() for event in on_gpu if _TO_PAGEABLE in event.name()}
    waits = [event for event in of_host if _WAIT.fullmatch(event.name())]
    waited = sum(event.duration_ns() for event in waits)
    waited += sum(e.duration_ns() for e in of_host if "Memcpy" in e.name() and e.correlation_id() in blocking)
    return Activity(
        launches=sum(_LAUNCH.fullmatch(event.name()) is not None for event in of_host) / calls,
        kernels=len(on_gpu) / calls,
        busy_seconds=_covered((e.start_ns(), e.start_ns() + e.duration_ns()) for e in on_gpu) / calls / 1e9,
        waits=len(waits) / calls,
        host_seconds=(ended - began - waited) / calls / 1e9,
    )


def _covered(spans: Iterable[tuple[int, int]]) -> int:
    """Return how much of the time line the spans cover; kernels of several streams run at once."""
    covered, until = 0, 0
    for start, end in sorted(spans):
        covered += max(0, end - max(start, until))
        until = max(until, end)
    return covered
