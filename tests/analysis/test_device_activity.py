"""Activity is read from the profiler's events: launches, kernels, busy time without overlap, and the host's waits."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from megachiar.analysis.device_activity import Activity, cpu_activity, gpu_activity, measure_activity

CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


class Event(NamedTuple):
    """An event as the profiler has it; times are in ns."""

    name_: str
    start: int
    duration: int
    device: torch.autograd.DeviceType = CPU
    correlation: int = 0

    def name(self) -> str:
        return self.name_

    def start_ns(self) -> int:
        return self.start

    def duration_ns(self) -> int:
        return self.duration

    def device_type(self) -> torch.autograd.DeviceType:
        return self.device

    def correlation_id(self) -> int:
        return self.correlation


OF_TWO_CALLS = [
    Event("cudaLaunchKernel", 1_000, 100, correlation=1),
    Event("cuLaunchKernelEx", 1_100, 100, correlation=2),
    Event("cudaGraphLaunch", 1_200, 100, correlation=3),
    Event("cudaMemsetAsync", 1_300, 50, correlation=4),
    Event("cudaMemcpyAsync", 1_400, 1_000, correlation=5),  # waits for its copy
    Event("cudaMemcpyAsync", 2_400, 100, correlation=6),  # from pinned memory: does not wait
    Event("cudaStreamSynchronize", 2_500, 500),
    Event("cudaDeviceSynchronize", 9_000, 5_000),  # after the calls: not theirs
    Event("one kernel", 2_000, 1_000, CUDA, 1),
    Event("another, at the same time", 2_500, 1_000, CUDA, 2),
    Event("within both", 2_600, 100, CUDA, 3),
    Event("later", 5_000, 500, CUDA, 3),
    Event("Memset (Device)", 5_500, 100, CUDA, 4),
    Event("Memcpy DtoH (Device -> Pageable)", 5_600, 100, CUDA, 5),
    Event("Memcpy HtoD (Pinned -> Device)", 9_500, 200, CUDA, 6),
]


def test_what_a_gpu_does():
    assert gpu_activity(OF_TWO_CALLS, began=0, ended=8_000, calls=2) == Activity(
        launches=1.5,
        kernels=3.5,
        busy_seconds=pytest.approx((1_500 + 700 + 200) / 2e9),
        waits=0.5,
        host_seconds=pytest.approx((8_000 - 500 - 1_000) / 2e9),
    )


def test_what_a_cpu_does():
    assert cpu_activity([Event("aten::mm", 0, 1), Event("forward", 0, 9), Event("aten::add", 2, 1)]).operations == 2
    x = torch.ones(2, 2)
    measured = measure_activity(lambda: (x + x, x * x), torch.device("cpu"))
    assert measured == Activity(operations=2)
