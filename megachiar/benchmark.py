"""Time contenders in turn, round by round, so that what disturbs the machine disturbs all of them.

A ratio is the median over rounds, with quartiles, of one contender's time divided by another's in the same round.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Spread(NamedTuple):
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Return median and quartiles of ``values``."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, low, high)

    def format(self, unit: str = "", scale: float = 1.0, digits: int = 2) -> str:
        """Return the spread as text, such as ``1.23 ms (1.20 to 1.30)``, each value times ``scale``."""
        median, low, high = (f"{value * scale:.{digits}f}" for value in self)
        return f"{median}{unit} ({low} to {high})"


class Times:
    """The seconds of each contender, round by round."""

    def __init__(self, seconds: dict[str, list[float]]):
        self.seconds = seconds

    def spread(self, name: str) -> Spread:
        """Return the spread of a contender's seconds."""
        return Spread.of(self.seconds[name])

    def speed_up(self, name: str, over: str) -> Spread:
        """Return how many times as fast ``name`` is as ``over``."""
        return Spread.of([b / a for a, b in zip(self.seconds[name], self.seconds[over], strict=True)])


def measure_interleaved(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Times:
    """Run each contender, which is warm already, once a round and return the seconds that it reports.

    Every round has an order of its own, drawn from a fixed seed. A contender may leave work to the system, such as
    memory to take back, and the same contender must not always follow it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(list(contenders), len(contenders)):
            seconds[name].append(contenders[name]())
    return Times(seconds)


def timed(
    function: Callable[[], object], device: torch.device, calls: int = 1, warm_up: int = 2
) -> Callable[[], float]:
    """Return a contender that reports the seconds of one call of ``function``.

    Args:
        function: is called.
        device: that it runs on; the GPU is waited for.
        calls: in a row, whose mean is reported.
        warm_up: calls made here, before anything is measured.
    """

    def measure() -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronise(device)
        return (time.perf_counter() - start) / calls

    for _ in range(warm_up):
        function()
    return measure


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], int]:
    """Return a large square matrix product, to measure a machine's arithmetic, and its FLOPs."""
    size = 8192 if device.type == "cuda" else 2048 if dtype == torch.float32 else 1024
    # A CPU without instructions for 16 bits may need seconds even for the smaller one.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def copy(device: torch.device) -> tuple[Callable[[], object], int]:
    """Return a large copy, to measure a machine's memory, and the bytes that it reads and writes."""
    numbers = torch.ones(2**29 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(numbers)
    return lambda: target.copy_(numbers), 2 * numbers.nbytes


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine of the measurements."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """Write ``record`` to ``path``, if there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
