"""Attention of all and of chosen rows against the dense formula; rotary embedding against complex numbers."""

from __future__ import annotations

import math

import pytest
import torch

from megachiar.kernels import attention as attention_module
from megachiar.kernels.attention import causal_attention, routed_attention
from megachiar.kernels.permute import permute_rows
from megachiar.kernels.rope import rotary_table, rotate

HEADS, CHANNELS = 2, 4


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None = None) -> torch.Tensor:
    """Every query (B, h, S, c) at the newest S of T positions against every key, later ones masked."""
    queries, keys = q.shape[2], k.shape[2]
    products = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    return products.masked_fill(later, -math.inf).softmax(-1) @ v


def inputs(sequences: int, queries: int, keys: int) -> list[torch.Tensor]:
    shapes = ((queries, 0), (keys, 1), (keys, 2))
    return [noise(sequences, HEADS, length, CHANNELS, seed=s).requires_grad_() for length, s in shapes]


def assert_same(got: torch.Tensor, expected: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Same values, and same gradients of ``tensors`` along one direction."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    direction = noise(*got.shape, seed=9)
    gradients = [torch.autograd.grad(y, tensors, direction) for y in (got, expected)]
    for g, e in zip(*gradients, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", (None, 1.0))
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (3, 7), (1, 9)])
def test_causal_attention_is_the_dense_formula(queries, keys, scale):
    tensors = inputs(3, queries, keys)
    assert_same(causal_attention(*tensors, scale=scale), dense_oracle(*tensors, scale), tensors)


def chosen_rows(name: str, sequences: int, queries: int) -> torch.Tensor:
    """Numbers of chosen rows, ascending."""
    mask = torch.rand(sequences, queries, generator=torch.Generator().manual_seed(3)) < 0.4
    match name:
        case "none":
            mask[:] = False
        case "all":
            mask[:] = True
        case "one":
            mask[:] = False
            mask[-1, queries // 2] = True
        case "one sequence without":
            mask[0, -1], mask[1] = True, False
        case "first of each":
            mask[:] = False
            mask[:, 0] = True
        case "same number of each":
            mask[:] = False
            mask[0, queries // 2 :] = mask[1:, : queries - queries // 2] = True
    return mask.flatten().nonzero().flatten()


CHOICES = ("none", "all", "one", "one sequence without", "first of each", "same number of each", "some")


@pytest.mark.parametrize("scale", (None, 1.0))
@pytest.mark.parametrize("chunk", (3, 512))
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (13, 13), (8, 8), (5, 12), (1, 6)])
def test_routed_attention_is_the_chosen_rows_of_the_dense_formula(monkeypatch, queries, keys, choice, chunk, scale):
    monkeypatch.setattr(attention_module, "QUERY_CHUNK", chunk)
    sequences = 3
    tensors = inputs(sequences, queries, keys)
    q, k, v = tensors
    rows = chosen_rows(choice, sequences, queries)
    flat = q.transpose(1, 2).flatten(0, 1).index_select(0, rows)
    expected = dense_oracle(*tensors, scale).transpose(1, 2).flatten(0, 1).index_select(0, rows)
    got = routed_attention(flat, k, v, rows, queries, scale=scale)
    assert got.shape == (len(rows), HEADS, CHANNELS)
    assert_same(got, expected, tensors)


def test_routed_attention_beyond_one_chunk_of_the_real_size():
    queries = attention_module.QUERY_CHUNK * 2 + 101
    q, k, v = (noise(2, 1, queries, 2, seed=s) for s in range(3))
    rows = (torch.rand(2 * queries, generator=torch.Generator().manual_seed(1)) < 0.8).nonzero().flatten()
    expected = dense_oracle(q, k, v).transpose(1, 2).flatten(0, 1).index_select(0, rows)
    got = routed_attention(q.transpose(1, 2).flatten(0, 1).index_select(0, rows), k, v, rows, queries)
    assert len(rows) > 2 * attention_module.QUERY_CHUNK
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_gradcheck_of_routed_attention():
    q, k, v = inputs(2, 5, 5)
    rows = torch.tensor([1, 2, 4, 8])
    flat = q.detach().transpose(1, 2).flatten(0, 1).index_select(0, rows).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: routed_attention(*t, rows, 5), (flat, k, v))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_routed_attention_in_16_bits_is_near_the_dense_formula(dtype):
    q, k, v = (t.detach().to(dtype) for t in inputs(2, 16, 16))
    rows = chosen_rows("some", 2, 16)
    expected = dense_oracle(q.double(), k.double(), v.double()).transpose(1, 2).flatten(0, 1).index_select(0, rows)
    got = routed_attention(q.transpose(1, 2).flatten(0, 1).index_select(0, rows), k, v, rows, 16)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("choice", ("some", "all"))
def test_dropout_leaves_out_attention_probabilities_at_its_rate(choice):
    queries, rate = 64, 0.25
    q, k = (torch.zeros(1, 1, queries, 2) for _ in range(2))
    v = torch.ones(1, 1, queries, 2)
    rows = chosen_rows(choice, 1, queries)
    torch.manual_seed(0)
    flat = q.flatten(0, 2)[:, None].index_select(0, rows)
    runs = torch.stack([routed_attention(flat, k, v, rows, queries, dropout=rate)[:, 0, 0] for _ in range(2000)])
    assert not runs[0].equal(runs[1])
    seen = (rows + 1).double()  # equal probabilities: the kept share of them, scaled up
    deviation = (rate / (1 - rate) / seen).sqrt()
    torch.testing.assert_close(runs.double().mean(0), torch.ones(len(rows)).double(), rtol=0, atol=0.06)
    torch.testing.assert_close(runs.double().std(0), deviation, rtol=0.1, atol=0)


# Rotary embedding ----------------------------------------------------------------------------------------------------


def test_rotation_is_multiplication_by_a_unit_complex_number():
    length, size, base = 9, 8, 10000.0
    x = noise(length, size)
    got = rotate(x, *rotary_table(length, size, base, x.device, x.dtype))
    frequency = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    turned = torch.complex(x[:, : size // 2], x[:, size // 2 :]) * torch.exp(1j * angle)
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1), rtol=0, atol=1e-14)


def test_products_of_rotated_rows_depend_on_distance_alone():
    cos, sin = rotary_table(64, 16, 10000.0, torch.device("cpu"), torch.float64)
    q, k = noise(16), noise(16, seed=1)
    near, far = (rotate(q, cos[i], sin[i]) @ rotate(k, cos[i - 3], sin[i - 3]) for i in (5, 60))
    torch.testing.assert_close(near, far, rtol=0, atol=1e-13)


def test_angles_are_exact_at_far_positions_in_fp32():
    cos, _ = rotary_table(2**17, 64, 10000.0, torch.device("cpu"), torch.float32)
    assert cos[-1, 0].item() == pytest.approx(math.cos(2**17 - 1), abs=1e-6)


def test_gradient_of_the_rotation():
    cos, sin = rotary_table(5, 6, 100.0, torch.device("cpu"), torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos[:, None], sin[:, None]), noise(2, 5, 3, 6).requires_grad_())


# Permutation ---------------------------------------------------------------------------------------------------------


def test_permuting_rows_and_its_gradient():
    x = noise(7, 3).requires_grad_()
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    inverse = torch.argsort(order)
    torch.testing.assert_close(permute_rows(x, order, inverse), x[order], rtol=0, atol=0)
    torch.testing.assert_close(permute_rows(x, order, inverse)[inverse], x, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda t: permute_rows(t, order, inverse), x)
