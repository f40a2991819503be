"""Measure how long this rank waits for other ranks, by timing the calls of ``torch.distributed`` that communicate.

DeepSpeed and this package call these functions by their names in the module, so that they are replaced there, as long
as a run lasts. A call costs two readings of a clock. On a GPU with NCCL a call returns before the ranks have
communicated: there the time of the host alone is measured, and a slow GPU does not show.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from megachiar.activity import Activity

COMMUNICATING = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
)


@contextlib.contextmanager
def measure_communication(activity: Activity) -> Iterator[None]:
    """Add the seconds of each call with which the main thread communicates to ``activity``, within this context."""
    originals = {name: getattr(dist, name) for name in COMMUNICATING}
    for name, original in originals.items():
        setattr(dist, name, _timed(original, activity))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _timed(function: Callable[..., Any], activity: Activity) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*arguments: Any, **named: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():  # a save, or a backward pass on a GPU
            with activity.communicating():
                return function(*arguments, **named)
        began = time.perf_counter()
        with activity.communicating():
            result = function(*arguments, **named)
        activity.end_wait(time.perf_counter() - began)  # a call that failed is no progress
        return result

    return timed
