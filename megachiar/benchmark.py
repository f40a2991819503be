"""Timing contenders side by side: in turn, round by round, so that what disturbs the machine disturbs all of them.

A ratio is the median over rounds of one contender's time by another's in the same round, with its quartiles.
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
        low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return cls(median, low, high)

    def format(self, unit: str = "", scale: float = 1.0, digits: int = 2) -> str:
        median, low, high = (f"{value * scale:.{digits}f}" for value in self)
        return f"{median}{unit} ({low} to {high})"


class Times:
    """Seconds of each contender, round by round."""

    def __init__(self, seconds: dict[str, list[float]]):
        self.seconds = seconds

    def spread(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def speed_up(self, name: str, over: str) -> Spread:
        """How many times as fast ``name`` is as ``over``."""
        return Spread.of([b / a for a, b in zip(self.seconds[name], self.seconds[over], strict=True)])


def measure_interleaved(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Times:
    """Let each contender run once a round and say its seconds. They are warm already.

    Their order is drawn anew for every round (from a fixed seed): one that leaves the system something to do, such as
    memory to take back, must not always leave it to the same next one.
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
    """A contender that measures ``function``: seconds a call, of ``calls`` in a row. It is warmed up here."""

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
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], int]:
    """A large square product, the yardstick of a machine's arithmetic, and its FLOPs."""
    size = 8192 if device.type == "cuda" else 2048 if dtype == torch.float32 else 1024
    # A CPU without instructions for 16 bits may need seconds even for the smaller one.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def copy(device: torch.device) -> tuple[Callable[[], object], int]:
    """A large copy, the yardstick of a machine's memory, and the bytes it reads and writes."""
    numbers = torch.ones(2**29 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(numbers)
    return lambda: target.copy_(numbers), 2 * numbers.nbytes


def machine(device: torch.device) -> dict[str, Any]:
    """What was measured on, for the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def write_json(path: Path | None, record: dict[str, Any]) -> None:
    """Write ``record`` where a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
