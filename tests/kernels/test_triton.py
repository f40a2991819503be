"""Triton kernels: interpreted on a CPU, compiled for an H100 without one, and run where there is one."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from support import WORKERS, run_command

WORKER = WORKERS / "triton_attention_worker.py"
ROWS_WORKER = WORKERS / "triton_rows_worker.py"
PARTITION_WORKER = WORKERS / "triton_partition_worker.py"

COMPILER = WORKERS / "triton_compile_worker.py"

pytest.importorskip("triton")


def check(found: dict[str, dict[str, float]], bounds: dict[str, float], cases: int) -> None:
    assert len(found) == cases
    for case, deviations in found.items():
        assert set(deviations) == {"output", "q", "k", "v"}
        bound = bounds[case.partition(":")[0]]
        wrong = {what: by for what, by in deviations.items() if not by <= bound}
        assert not wrong, case


def check_rows(found: dict[str, dict[str, float]], fp32: float) -> None:
    """H of bf16 rows is as exact as that of fp32 rows: routes hang on it."""
    assert len(found) == 62
    for case, deviations in found.items():
        bound = fp32 if case.startswith("fp32") else 1e-2
        if "entropy" in case:
            bound = 1e-5
        wrong = {what: by for what, by in deviations.items() if not by <= bound}
        assert deviations and not wrong, case


@pytest.mark.parametrize(("which", "cases"), [("pairs", 56), pytest.param("all", 112, marks=pytest.mark.slow)])
def test_interpreted_kernels_compute_the_dense_formula(which, cases):
    """The interpreter cuts bf16 off where the hardware rounds."""
    done = run_command(sys.executable, WORKER, "cpu", which, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout), {"fp32": 2e-6, "bf16": 2e-2}, cases)


def test_interpreted_kernels_of_rows_compute_their_definitions():
    """DCT, entropy, mixing, norms, RoPE, loss. The worker fails where a kernel was not launched."""
    done = run_command(sys.executable, ROWS_WORKER, "cpu", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    check_rows(json.loads(done.stdout), fp32=2e-6)


def check_partitions(found: dict[str, dict[str, float]], fp32: float) -> None:
    """A row that is read without having been written is NaN, which no bound lets pass."""
    assert len(found) == 108
    for case, deviations in found.items():
        bound = {"fp32": fp32, "bf16": 2e-2, "layer": 2e-5}[case.partition(":")[0]]
        wrong = {what: by for what, by in deviations.items() if not by <= bound}
        assert deviations and not wrong, case


def test_interpreted_kernels_of_static_shapes_compute_their_definitions():
    """Partition, products between bounds on the device, attention, RoPE and norms of two operators."""
    done = run_command(sys.executable, PARTITION_WORKER, "cpu", TRITON_INTERPRET="1", timeout=500)
    assert done.returncode == 0, done.stderr
    check_partitions(json.loads(done.stdout), fp32=2e-6)


def test_attention_takes_the_kernels_where_they_run():
    done = run_command(sys.executable, WORKER, "dispatch", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert max(json.loads(done.stdout).values()) <= 2e-6


# Attention of 2 head sizes, plain, with dropout, and within documents; 4 kernels of rows of 3 sizes, their entropy (in
# fp32 of 2 sizes), 7 kernels of static shapes and other forms of 3 of them of 3 sizes; 3 of logits: in 2 types.
ALL = 2 * (3 * 6 + 4 * 3 + 3 + 10 * 3 + 3) - 1
# Attention of the larger head size with dropout within documents, 5 kernels of rows and 7 of static shapes of one size,
# with other forms of 3 of them, 3 of logits: each kernel where it needs most registers.
FEW = 2 * (3 + 5 + 10 + 3)


@pytest.mark.parametrize(
    ("which", "capability", "kernels"),
    [
        ("few", 90, FEW),
        pytest.param("few", 100, FEW, marks=pytest.mark.slow),
        pytest.param("all", 90, ALL, marks=pytest.mark.slow),
        pytest.param("all", 100, ALL, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_an_h100_and_a_b200_without_spilled_registers(tmp_path, which, capability, kernels):
    done = run_command(sys.executable, COMPILER, which, str(capability), TRITON_CACHE_DIR=str(tmp_path), timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == kernels
    spilled = {kernel: use for kernel, use in found.items() if use["STACK"] or use["LOCAL"]}
    assert not spilled
    assert all(use["shared"] <= 227 * 1024 for use in found.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_kernels_compute_the_dense_formula():
    done = run_command(sys.executable, WORKER, "cuda", "all")
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout), {"fp32": 1e-5, "bf16": 2e-2}, 112)
    done = run_command(sys.executable, ROWS_WORKER, "cuda")
    assert done.returncode == 0, done.stderr
    check_rows(json.loads(done.stdout), fp32=1e-5)
    done = run_command(sys.executable, PARTITION_WORKER, "cuda")
    assert done.returncode == 0, done.stderr
    check_partitions(json.loads(done.stdout), fp32=1e-5)
