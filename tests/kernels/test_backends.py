"""What a log says of the kernels that run, and that it is so."""

from __future__ import annotations

import pytest
import torch

from megachiar.kernels import gpu
from megachiar.kernels.backends import describe_backends

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def allowed():
    yield
    gpu.allow(True)


@pytest.mark.parametrize(("d", "transform"), [(64, "matrix product"), (256, "FFT")])
def test_a_cpu_runs_torch(d, transform):
    (line,) = describe_backends(d, 4, CPU, torch.float32)
    assert "torch" in line and transform in line and "the device is a CPU" in line


def test_torch_can_be_asked_for(allowed):
    gpu.allow(False)
    (line,) = describe_backends(256, 4, GPU, torch.float32)
    assert "precision.kernels is torch" in line
    assert not gpu.has_kernels(GPU)


@pytest.mark.skipif(gpu.triton is None, reason="needs triton")
@pytest.mark.parametrize(
    ("d", "heads", "others"),
    [
        (256, 4, ()),
        (384, 4, ("routed attention", "spectral entropy")),
        (160, 10, ("spectral entropy",)),
        (4096, 32, ()),
        (32768, 256, ("spectral entropy", "norms", "RoPE")),
    ],
)
def test_a_gpu_runs_triton_where_the_kernels_take_the_sizes(d, heads, others):
    first, *rest = describe_backends(d, heads, GPU, torch.bfloat16)
    assert first.startswith("Triton for ")
    for other in others:
        assert other not in first and any(line.startswith(other) for line in rest)
    assert len(rest) == 2 + len(others)  # and who serves attention in every row, and mixing
