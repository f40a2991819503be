"""Which backend computes attention, what a log says of the kernels that run, and that it is so."""

from __future__ import annotations

import pytest
import torch

from megachiar.kernels import gpu
from megachiar.kernels.attention import ROUTED_KEYS_BY_TRITON, Backend, choose_backend
from megachiar.kernels.attention_options import AttentionOptions
from megachiar.kernels.backends import describe_backends
from megachiar.kernels.dropout import KeyedDropout
from megachiar.kernels.routed_rows import RoutedRows

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


NONE = AttentionOptions()
DROPS = AttentionOptions(dropout=KeyedDropout(0.1, torch.zeros(4, dtype=torch.int64), 0))
DOCUMENTS = AttentionOptions(document_starts=torch.zeros(4, dtype=torch.int64))
ROWS = RoutedRows(torch.arange(4), 2, 8)
LONG = RoutedRows(torch.arange(4), 2, ROUTED_KEYS_BY_TRITON + 1)


@pytest.mark.parametrize(
    ("options", "rows", "keys_are_routed", "on_cpu", "with_triton", "without_triton"),
    [
        (NONE, None, False, Backend.SDPA, Backend.SDPA, Backend.SDPA),
        (DROPS, None, False, Backend.DROPOUT, Backend.TRITON, Backend.DROPOUT),
        (DOCUMENTS, None, False, Backend.CPU, Backend.TRITON, Backend.MASKED_SDPA),
        (NONE, ROWS, False, Backend.CPU, Backend.TRITON, Backend.MASKED_SDPA),
        (DROPS, ROWS, False, Backend.DROPOUT, Backend.TRITON, Backend.DROPOUT),
        (NONE, ROWS, True, Backend.CPU, Backend.TRITON, Backend.SDPA),
        (NONE, LONG, True, Backend.CPU, Backend.SDPA, Backend.SDPA),
        (NONE, LONG, False, Backend.CPU, Backend.TRITON, Backend.MASKED_SDPA),
        (DOCUMENTS, LONG, True, Backend.CPU, Backend.TRITON, Backend.MASKED_SDPA),
        (DROPS, LONG, True, Backend.DROPOUT, Backend.TRITON, Backend.DROPOUT),
    ],
)
def test_each_attention_product_has_one_backend(
    monkeypatch, options, rows, keys_are_routed, on_cpu, with_triton, without_triton
):
    def backend(device: str, channels: int = 64) -> Backend:
        return choose_backend(torch.empty(4, 2, channels, device=device), options, rows, keys_are_routed)

    assert backend("cpu") is on_cpu
    assert backend("meta") is without_triton
    monkeypatch.setattr(gpu, "has_kernels", lambda device: True)
    assert backend("meta") is with_triton
    assert backend("meta", channels=48) is without_triton, "the kernels take no heads of 48 channels"


def test_dropout_at_rate_0_does_not_count_as_dropout():
    options = AttentionOptions(dropout=KeyedDropout(0.0, torch.zeros(4, dtype=torch.int64), 0))
    assert choose_backend(torch.empty(4, 2, 64), options) is Backend.SDPA
