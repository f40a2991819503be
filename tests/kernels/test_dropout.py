"""Keyed dropout against a NumPy transcription of its definition, against chance, and its Triton kernel against both."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from dropout_oracle import numpy_head_keys, numpy_mask, numpy_row_keys, some_keys

from megachiar.kernels import dropout as dropout_module
from megachiar.kernels.dropout import KeyedDropout, apply_dropout, head_keys, row_keys


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def mask_of(dropout: KeyedDropout, columns: int, first_column: int = 0) -> torch.Tensor:
    return apply_dropout(torch.ones(len(dropout.keys), columns), dropout, first_column) != 0


# The definition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", (0, 1234, 2**31))
def test_row_keys_are_the_definition(seed):
    sample_ids, positions = torch.tensor([0, 1, 7, 2**40])[:, None], torch.arange(9)
    got = row_keys(seed, sample_ids, positions)
    assert got.shape == (4, 9) and got.dtype == torch.int64
    np.testing.assert_array_equal(got.numpy().view(np.uint64), numpy_row_keys(seed, sample_ids, positions))


def test_head_keys_are_the_definition():
    keys = some_keys(6).view(2, 3)
    expected = numpy_head_keys(keys.numpy().view(np.uint64), 5, 4)
    np.testing.assert_array_equal(head_keys(keys, 5, 4).numpy().view(np.uint64), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("probability", (0.1, 0.5, 0.97))
@pytest.mark.parametrize(("n", "m", "first_column", "site"), [(37, 50, 0, 0), (3, 1, 9, -8), (5, 1000, 4096, 227)])
def test_dropout_is_the_definition(dtype, probability, n, m, first_column, site):
    dropout = KeyedDropout(probability, some_keys(n), site)
    x, gradient = noise(n, m, dtype=dtype).requires_grad_(), noise(n, m, dtype=dtype)
    mask = numpy_mask(dropout.keys.numpy().view(np.uint64), site, probability, m, first_column)
    got = apply_dropout(x, dropout, first_column)
    zero = torch.zeros((), dtype=dtype)
    assert got.dtype == dtype
    assert got.equal(torch.where(mask, x * (1 / (1 - probability)), zero))
    got.backward(gradient)
    assert x.grad.equal(torch.where(mask, gradient * (1 / (1 - probability)), zero))


def test_gradient_of_dropout():
    dropout = KeyedDropout(0.4, some_keys(4), 3)
    assert torch.autograd.gradcheck(lambda x: apply_dropout(x, dropout, 2), noise(4, 6).requires_grad_())


def test_without_dropout_x_itself_is_given():
    x = noise(3, 4)
    assert apply_dropout(x, None) is x
    assert apply_dropout(x, KeyedDropout(0.0, some_keys(3), 1)) is x


@pytest.mark.parametrize("shape", ((0, 5), (5, 0)))
def test_dropout_of_nothing(shape):
    x = torch.ones(shape, requires_grad=True)
    got = apply_dropout(x, KeyedDropout(0.1, some_keys(shape[0]), 1))
    got.sum().backward()
    assert got.shape == x.grad.shape == shape


def test_x_that_does_not_lie_row_by_row():
    dropout, x = KeyedDropout(0.3, some_keys(40), 2), noise(60, 40).T
    assert apply_dropout(x, dropout).equal(apply_dropout(x.contiguous(), dropout))


def test_what_is_not_finite_and_dropped_is_0():
    dropout, x = KeyedDropout(0.5, some_keys(8), 2), torch.full((8, 64), math.nan)
    assert apply_dropout(x, dropout).isnan().equal(mask_of(dropout, 64))


# Independence of the layout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", (1, 100, 2**18))
def test_a_shard_of_rows_and_columns_has_its_part_of_the_mask(monkeypatch, chunk):
    dropout = KeyedDropout(0.3, some_keys(64), 11)
    whole = mask_of(dropout, 96)
    monkeypatch.setattr(dropout_module, "CHUNK", chunk)
    for rows in (torch.arange(16, 48), torch.tensor([3]), torch.tensor([60, 2, 2, 33])):
        for first, last in ((0, 96), (32, 64), (95, 96)):
            assert mask_of(dropout.select(rows), last - first, first).equal(whole[rows, first:last])


def test_a_sample_has_its_mask_in_any_micro_batch():
    positions = torch.arange(8)
    whole = mask_of(KeyedDropout(0.3, row_keys(1, torch.arange(6)[:, None], positions).flatten(), 1), 32)
    for first in range(6):
        keys = row_keys(1, torch.tensor([first]), positions[5:])  # alone, and a later part of it
        assert mask_of(KeyedDropout(0.3, keys, 1), 32).equal(whole[first * 8 + 5 : first * 8 + 8])


def test_no_generator_is_asked():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dropout = KeyedDropout(0.3, some_keys(16), 1)
    first = mask_of(dropout, 32)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(1)
    assert mask_of(dropout, 32).equal(first)


# Chance --------------------------------------------------------------------------------------------------------------
# Masks are fixed by their keys, so that these tests pass always or never. 4.5 sigma: one in 150,000 for each bound.

SIGMAS = 4.5


def standardised(mask: torch.Tensor, probability: float) -> torch.Tensor:
    """Mean 0 and variance 1 if elements stay with probability 1 - p."""
    return (mask.double() - (1 - probability)) / math.sqrt(probability * (1 - probability))


def deviation(a: torch.Tensor, b: torch.Tensor | None = None) -> float:
    """Sigmas between the mean of (the product of) independent standardised numbers and 0."""
    return (a if b is None else a * b).mean().item() * math.sqrt(a.numel())


def spread(sums: torch.Tensor) -> float:
    """Sigmas between the mean square of standardised sums and 1; chi-square is near normal for so many."""
    return (sums.square().mean().item() - 1) * math.sqrt(len(sums) / 2)


def oddities(mask: torch.Tensor, probability: float) -> dict[str, float]:
    """Sigmas of what chance would make normal."""
    x = standardised(mask, probability)
    n, m = x.shape
    found = {"mean": deviation(x), "rows' sums": spread(x.sum(1) / m**0.5), "columns' sums": spread(x.sum(0) / n**0.5)}
    for shift in (1, 2, 16, n // 2):
        found[f"rows {shift} apart"] = deviation(x[shift:], x[:-shift])
    for shift in (1, 2, 64, m // 2):
        found[f"columns {shift} apart"] = deviation(x[:, shift:], x[:, :-shift])
    found["squares of four"] = deviation(x[1:, 1:] * x[:-1, 1:], x[1:, :-1] * x[:-1, :-1])
    return found


@pytest.mark.parametrize("probability", (0.1, 0.5, 0.9))
@pytest.mark.parametrize("site", (0, 1, 8))
def test_a_mask_is_like_chance(probability, site):
    mask = mask_of(KeyedDropout(probability, some_keys(2048), site), 1024)
    assert {k: v for k, v in oddities(mask, probability).items() if abs(v) > SIGMAS} == {}


@pytest.mark.parametrize("first_head", (0, 12))
def test_a_mask_of_heads_is_like_chance(first_head):
    keys = head_keys(some_keys(256), first_head, 8).flatten()  # neighbouring rows: heads of one query
    mask = mask_of(KeyedDropout(0.1, keys, 3), 1024)
    assert {k: v for k, v in oddities(mask, 0.1).items() if abs(v) > SIGMAS} == {}


def poor_masks() -> dict[str, torch.Tensor]:
    """Rate 1/2, with the oddities that hashes may have."""
    row, column = torch.arange(2048)[:, None], torch.arange(1024)
    good = torch.rand(2048, 1024, generator=torch.Generator().manual_seed(0))
    halves = torch.rand(2048, 512, generator=torch.Generator().manual_seed(1)) < 0.5
    share = torch.rand(2048, 1, generator=torch.Generator().manual_seed(2)) * 0.1 - 0.05
    of_row, of_column = (torch.rand(k, generator=torch.Generator().manual_seed(k)) < 0.5 for k in (2048, 1024))
    return {
        "a rate that is off": good < 0.503,
        "rates of rows that differ": good < 0.5 + share,
        "numbers that were not mixed": (row * 0x7FEB352D + column * 0x846CA68B) % 2**32 < 2**31,
        "columns that repeat": torch.cat([halves, halves], 1),
        "rows that repeat": torch.cat([halves.view(1024, 1024)] * 2),
        "key of row XOR key of column": of_row[:, None] ^ of_column,
    }


@pytest.mark.parametrize("name", poor_masks())
def test_poor_masks_are_found_out(name):
    assert max(abs(v) for v in oddities(poor_masks()[name], 0.5).values()) > SIGMAS


@pytest.mark.parametrize("probability", (0.1, 0.5))
def test_no_two_columns_and_no_two_rows_are_alike(probability):
    x = standardised(mask_of(KeyedDropout(probability, some_keys(4096), 2), 1024), probability).float()
    for vectors in (x, x.T):
        count, length = vectors.shape
        related = vectors @ vectors.T / math.sqrt(length)
        pairs = related[torch.ones(count, count, dtype=torch.bool).triu(1)].double()
        assert pairs.abs().max() < 7  # of 8 million; at rate 0.1 the tails are a little heavier than normal
        assert abs(pairs.square().mean() - 1) < SIGMAS * math.sqrt(2 / len(pairs)) * 1.2


def test_masks_of_other_sites_samples_positions_heads_and_seeds_are_independent():
    sample_ids, positions = torch.arange(128)[:, None], torch.arange(16)
    keys = row_keys(0, sample_ids, positions).flatten()

    def mask(keys: torch.Tensor = keys, site: int = 0) -> torch.Tensor:
        return standardised(mask_of(KeyedDropout(0.2, keys, site), 512), 0.2)

    base = mask()
    others = {f"site {s}": mask(site=s) for s in (-8, 1, 2, 8, 225)}
    others |= {f"seed {s}": mask(row_keys(s, sample_ids, positions).flatten()) for s in (1, 2, 2**20)}
    others |= {f"samples {k} on": mask(row_keys(0, sample_ids + k, positions).flatten()) for k in (1, 128, 2**33)}
    others |= {f"positions {k} on": mask(row_keys(0, sample_ids, positions + k).flatten()) for k in (1, 16, 4096)}
    others |= {f"head {h}": mask(head_keys(keys, h, 1).flatten()) for h in (0, 1, 15)}
    names = list(others)
    found = {name: deviation(base, others[name]) for name in names}
    found |= {f"{a}, {b}": deviation(others[a], others[b]) for a, b in pairwise(names)}
    assert {k: v for k, v in found.items() if abs(v) > SIGMAS} == {}


# Triton --------------------------------------------------------------------------------------------------------------

INTERPRETED = """
import torch
from megachiar.kernels import gpu
from megachiar.kernels.attention import causal_attention, routed_attention
from megachiar.kernels.attention_options import AttentionOptions
from megachiar.kernels.dropout import KeyedDropout, apply_dropout, row_keys
from megachiar.kernels.routed_rows import RoutedRows

SHAPES = (37, 100, 0, 0), (5, 1500, 7, 225), (3, 1, 2, -8), (9, 2048, 0, 1)
launched = []

def both(function, *tensors):
    results = []
    for kernels in (False, True):
        gpu.has_kernels = lambda device: kernels and not launched.append(kernels)
        inputs = [t.clone().requires_grad_() for t in tensors]
        y = function(*inputs)
        results.append([y, *torch.autograd.grad(y, inputs, y.detach().sin())])
    return results

def same_bits(pairs):
    for a, b in zip(*pairs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))

# The interpreter cuts fp32 off where it becomes bf16: at rate 1/2 there is nothing to round.
for dtype, probability in ((torch.float32, 0.1), (torch.float64, 0.1), (torch.float16, 0.1), (torch.bfloat16, 0.5)):
    for n, m, first, site in (*SHAPES, (0, 4, 0, 1), (4, 0, 0, 1)):
        dropout = KeyedDropout(probability, row_keys(3, torch.arange(n), torch.tensor(4)), site)
        same_bits(both(lambda x: apply_dropout(x, dropout, first), torch.randn(n, m).to(dtype)))
        same_bits(both(lambda x: apply_dropout(x, dropout, first), torch.randn(m, n).to(dtype).T))

q, k, v = torch.randn(3, 2, 2, 20, 4, dtype=torch.float64)
keys = row_keys(3, torch.arange(2)[:, None], torch.arange(20)).flatten()
options = AttentionOptions(KeyedDropout(0.1, keys, 3), first_head=5)
same_bits(both(lambda *t: causal_attention(*t, options), q, k, v))
rows = torch.arange(1, 40, 3)
of_rows = options._replace(dropout=options.dropout.select(rows))
routed = q.transpose(1, 2).flatten(0, 1)[rows]
same_bits(both(lambda *t: routed_attention(*t, RoutedRows(rows, 2, 20), of_rows), routed, k, v))
assert True in launched
print("same bits")
"""

COMPILED = """
import re, struct, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Planned:
    get_current_device = get_current_stream = lambda self, device=None: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Planned())
from megachiar.kernels import triton_dropout
launch = triton_dropout._drop

class Recorder:
    def __getitem__(self, grid):
        return lambda *arguments, **constants: compiled.append(launch.warmup(*arguments, grid=grid, **constants))

compiled, scale = [], 1 / 0.9
triton_dropout._drop = Recorder()
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for m, site in ((1024, -8), (1000, 3)):
        x, keys = torch.empty(8, m, dtype=dtype), torch.empty(8, dtype=torch.int64)
        triton_dropout.drop(x, keys, torch.empty(m, dtype=torch.int32), site, -(2**30), scale, 0x7FEB352D, x)
        kernel = compiled[-1]
        assert kernel.asm["cubin"]
        sign = "d" if dtype == torch.float64 else "f"
        assert f"0{sign}{struct.pack('>' + sign, scale).hex()}" in kernel.asm["ptx"].lower(), dtype
print("compiled", len(compiled))
"""

WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
from megachiar.kernels import gpu
from megachiar.kernels.dropout import KeyedDropout, apply_dropout, row_keys
assert gpu.triton is None and not gpu.has_kernels(torch.device("cuda"))
dropout = KeyedDropout(0.5, row_keys(0, torch.arange(4), torch.tensor(0)), 1)
print(apply_dropout(torch.ones(4, 64), dropout).sum().item())
"""


def run_python(source: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_triton_kernel_interpreted_gives_the_same_bits():
    pytest.importorskip("triton")
    assert run_python(INTERPRETED, TRITON_INTERPRET="1") == "same bits\n"


def test_the_triton_kernel_compiles_for_an_h100_with_the_exact_scale(tmp_path):
    pytest.importorskip("triton")
    assert run_python(COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiled 8\n"


def test_dropout_without_triton():
    keys = row_keys(0, torch.arange(4), torch.tensor(0))
    expected = apply_dropout(torch.ones(4, 64), KeyedDropout(0.5, keys, 1)).sum().item()
    assert float(run_python(WITHOUT)) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernels", (True, False))
def test_a_gpu_gives_the_same_bits(monkeypatch, kernels):
    if kernels:
        pytest.importorskip("triton")
    else:
        monkeypatch.setattr("megachiar.kernels.gpu.has_kernels", lambda device: False)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for n, m, first_column, site in ((37, 50, 0, 0), (3, 1, 9, -8), (2048, 1000, 4096, 227)):
            x, keys = noise(n, m, dtype=dtype), some_keys(n)
            got = []
            for device in ("cpu", "cuda"):
                there = x.to(device).requires_grad_()
                y = apply_dropout(there, KeyedDropout(0.1, keys.to(device), site), first_column)
                got.append([y.cpu(), torch.autograd.grad(y, there, there.detach())[0].cpu()])
            assert all(on_cpu.equal(on_gpu) for on_cpu, on_gpu in zip(*got, strict=True)), (dtype, n)
