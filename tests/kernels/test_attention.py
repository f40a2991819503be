"""Attention of all and of routed rows against the dense formula; rotary embedding against complex numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dropout_oracle import numpy_head_keys, numpy_mask, some_keys

from megachiar.kernels import cpu_attention
from megachiar.kernels import dropout_attention as dropout_module
from megachiar.kernels import masked_sdpa as masked_module
from megachiar.kernels.attention import causal_attention, routed_attention, routed_self_attention
from megachiar.kernels.attention_options import AttentionOptions
from megachiar.kernels.dropout import KeyedDropout
from megachiar.kernels.permute import permute, unpermute
from megachiar.kernels.rope import keys_and_values, rotary_table, rotate
from megachiar.kernels.routed_rows import RoutedRows

HEADS, CHANNELS = 2, 4


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_oracle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    stays: torch.Tensor | None = None,
    rate: float = 0.0,
    document_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every query (B, h, S, c) at the newest S of T positions against every key, later ones masked, and those before
    ``document_starts`` (B, S).

    ``stays`` (B, h, S, T): probabilities that dropout at this rate leaves.
    """
    queries, keys = q.shape[2], k.shape[2]
    products = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
    if document_starts is not None:
        later = later | (torch.arange(keys) < document_starts[:, None, :, None])
    probabilities = products.masked_fill(later, -math.inf).softmax(-1)
    return (probabilities if stays is None else probabilities * stays / (1 - rate)) @ v


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
    assert_same(causal_attention(*tensors, AttentionOptions(scale=scale)), dense_oracle(*tensors, scale), tensors)


def routed_indices(name: str, sequences: int, queries: int) -> torch.Tensor:
    """Numbers of routed rows, ascending."""
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


ROUTINGS = ("none", "all", "one", "one sequence without", "first of each", "same number of each", "some")


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("length", (1, 2, 13))
def test_routed_self_attention_sees_no_other_rows(length, routing):
    sequences = 3
    tensors = inputs(sequences, length, length)
    rows = routed_indices(routing, sequences, length)
    routed = torch.zeros(sequences * length, dtype=torch.bool).index_fill(0, rows, True).view(sequences, 1, 1, length)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in tensors)  # (rows, h, c)
    products = tensors[0] @ tensors[1].mT / math.sqrt(CHANNELS)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    probabilities = products.masked_fill(later, -math.inf).masked_fill(~routed, -1e300).softmax(-1)
    expected = (probabilities @ tensors[2]).transpose(1, 2).flatten(0, 1)[rows]
    assert_same(
        routed_self_attention(q[rows], k[rows], v[rows], RoutedRows(rows, sequences, length)), expected, tensors
    )


WAYS = {"pieces": (3, 0.0), "a piece a sequence": (512, 0.0), "together": (512, math.inf)}
"""Of a CPU: ``LEAF`` and ``MOST_PADDED``."""


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    leaf, padded = WAYS[request.param]
    monkeypatch.setattr(cpu_attention, "LEAF", leaf)
    monkeypatch.setattr(cpu_attention, "MOST_PADDED", padded)


@pytest.mark.parametrize("scale", (None, 1.0))
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (13, 13), (8, 8), (5, 12), (1, 6)])
def test_routed_attention_is_the_routed_rowsof_the_dense_formula(way, queries, keys, routing, scale):
    sequences = 3
    tensors = inputs(sequences, queries, keys)
    q, k, v = tensors
    rows = routed_indices(routing, sequences, queries)
    flat = q.transpose(1, 2).flatten(0, 1).index_select(0, rows)
    expected = dense_oracle(*tensors, scale).transpose(1, 2).flatten(0, 1).index_select(0, rows)
    got = routed_attention(flat, k, v, RoutedRows(rows, sequences, queries), AttentionOptions(scale=scale))
    assert got.shape == (len(rows), HEADS, CHANNELS)
    assert_same(got, expected, tensors)


def test_routed_attention_beyond_one_chunk_of_the_real_size():
    queries = cpu_attention.LEAF * 2 + 101
    q, k, v = (noise(2, 1, queries, 2, seed=s) for s in range(3))
    rows = (torch.rand(2 * queries, generator=torch.Generator().manual_seed(1)) < 0.8).nonzero().flatten()
    expected = dense_oracle(q, k, v).transpose(1, 2).flatten(0, 1).index_select(0, rows)
    got = routed_attention(q.transpose(1, 2).flatten(0, 1).index_select(0, rows), k, v, RoutedRows(rows, 2, queries))
    assert len(rows) > 2 * cpu_attention.LEAF
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_gradcheck_of_routed_attention():
    q, k, v = inputs(2, 5, 5)
    rows = torch.tensor([1, 2, 4, 8])
    flat = q.detach().transpose(1, 2).flatten(0, 1).index_select(0, rows).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: routed_attention(*t, RoutedRows(rows, 2, 5)), (flat, k, v))


@pytest.mark.parametrize("way", ("a piece a sequence", "together"), indirect=True)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_routed_attention_in_16_bits_is_near_the_dense_formula(way, dtype):
    tensors = [t.detach().to(dtype).requires_grad_() for t in inputs(2, 16, 16)]
    rows = routed_indices("some", 2, 16)
    expected = dense_oracle(*(t.double() for t in tensors)).transpose(1, 2).flatten(0, 1).index_select(0, rows)
    q, k, v = tensors
    got = routed_attention(q.transpose(1, 2).flatten(0, 1).index_select(0, rows), k, v, RoutedRows(rows, 2, 16))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)
    gradients = (torch.autograd.grad(y.double().square().sum(), tensors) for y in (got, expected))
    for g, e in zip(*gradients, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g, e, rtol=0.04, atol=0.04)


def test_sequences_of_few_queries_take_one_call(monkeypatch):
    calls = []
    function = cpu_attention._AttendTogether.apply
    monkeypatch.setattr(cpu_attention._AttendTogether, "apply", lambda *a: calls.append(a) or function(*a))
    _, k, v = inputs(3, 40, 40)
    for counts, together in (((9, 10, 8), True), ((1, 10, 8), False), ((10, 10, 10), True)):
        rows = torch.cat([torch.arange(count) * 4 + 40 * b for b, count in enumerate(counts)])
        routed_attention(noise(len(rows), HEADS, CHANNELS), k, v, RoutedRows(rows, 3, 40))
        assert bool(calls) is together, counts
        calls.clear()


# Dropout of probabilities --------------------------------------------------------------------------------------------

RATE, SITE = 0.3, 11


def masks(sequences: int, queries: int, keys: int, first_head: int = 0, heads: int = HEADS) -> torch.Tensor:
    """(B, h, S, T), True where a probability stays: from NumPy's transcription of the hash."""
    of_rows = some_keys(sequences * queries).view(sequences, queries).numpy().astype("uint64")
    of_heads = numpy_head_keys(of_rows, first_head, heads).swapaxes(1, 2)
    return numpy_mask(of_heads, SITE, RATE, keys)


def keyed(sequences: int, queries: int) -> KeyedDropout:
    return KeyedDropout(RATE, some_keys(sequences * queries), SITE)


@pytest.fixture(params=("one block", "small blocks", "few probabilities", "all sequences", "all sequences, in blocks"))
def blocks(request, monkeypatch) -> str:
    """How queries are put together."""
    name = request.param
    if name == "small blocks":
        monkeypatch.setattr(dropout_module, "CPU_QUERIES", 3)
    if "sequences" in name:
        monkeypatch.setattr(dropout_module, "_at_once", lambda positions, device: tuple(positions.shape))
    if name in ("few probabilities", "all sequences, in blocks"):
        monkeypatch.setattr(dropout_module, "PROBABILITIES", 150)
    return name


@pytest.mark.parametrize(("first_head", "scale"), [(0, None), (6, 1.0)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (3, 7), (1, 9)])
def test_causal_attention_with_dropout_is_the_dense_formula(blocks, queries, keys, first_head, scale):
    tensors = inputs(3, queries, keys)
    expected = dense_oracle(*tensors, scale, masks(3, queries, keys, first_head), RATE)
    got = causal_attention(*tensors, AttentionOptions(keyed(3, queries), first_head, scale))
    assert_same(got, expected, tensors)


@pytest.mark.parametrize(("first_head", "scale"), [(0, None), (6, 1.0)])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (13, 13), (5, 12)])
def test_routed_attention_with_dropout_is_the_routed_rowsof_the_dense_formula(
    blocks, queries, keys, routing, first_head, scale
):
    sequences = 3
    tensors = inputs(sequences, queries, keys)
    q, k, v = tensors
    rows = routed_indices(routing, sequences, queries)
    flat = q.transpose(1, 2).flatten(0, 1).index_select(0, rows)
    expected = dense_oracle(*tensors, scale, masks(sequences, queries, keys, first_head), RATE)
    expected = expected.transpose(1, 2).flatten(0, 1).index_select(0, rows)
    dropout = keyed(sequences, queries).select(rows)
    options = AttentionOptions(dropout, first_head, scale)
    got = routed_attention(flat, k, v, RoutedRows(rows, sequences, queries), options)
    assert got.shape == (len(rows), HEADS, CHANNELS)
    assert_same(got, expected, tensors)


@pytest.mark.parametrize("routing", ("some", "all"))
def test_dropout_beyond_one_block_of_the_real_size(routing):
    queries = dropout_module.CPU_QUERIES * 2 + 37
    tensors = inputs(2, queries, queries)
    q, k, v = tensors
    rows = routed_indices(routing, 2, queries)
    flat = q.transpose(1, 2).flatten(0, 1).index_select(0, rows)
    expected = dense_oracle(*tensors, None, masks(2, queries, queries), RATE)
    expected = expected.transpose(1, 2).flatten(0, 1).index_select(0, rows)
    assert len(rows) / 2 > dropout_module.CPU_QUERIES / 2
    got = routed_attention(flat, k, v, RoutedRows(rows, 2, queries), AttentionOptions(keyed(2, queries).select(rows)))
    assert_same(got, expected, tensors)


@pytest.mark.parametrize("routing", ("some", "all"))
def test_ranks_that_share_the_heads_compute_parts_of_the_whole(routing):
    queries, heads = 11, 6
    q, k, v = (noise(2, heads, queries, CHANNELS, seed=s).requires_grad_() for s in range(3))
    rows = routed_indices(routing, 2, queries)
    dropout = keyed(2, queries).select(rows)

    def attention(of_rank: slice) -> torch.Tensor:
        flat = q[:, of_rank].transpose(1, 2).flatten(0, 1).index_select(0, rows)
        options = AttentionOptions(dropout, of_rank.start)
        return routed_attention(flat, k[:, of_rank], v[:, of_rank], RoutedRows(rows, 2, queries), options)

    parts = torch.cat([attention(slice(first, first + 2)) for first in range(0, heads, 2)], 1)
    assert_same(parts, attention(slice(0, heads)), [q, k, v])


def test_a_sequence_alone_has_the_dropout_it_has_in_a_micro_batch():
    tensors, dropout = inputs(4, 9, 9), keyed(4, 9)
    whole = causal_attention(*tensors, AttentionOptions(dropout))
    for i in range(4):
        options = AttentionOptions(dropout.select(torch.arange(i * 9, i * 9 + 9)))
        alone = causal_attention(*(t[i : i + 1] for t in tensors), options)
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-12)


def test_dropout_at_rate_0_is_none():
    tensors = inputs(2, 7, 7)
    options = AttentionOptions(KeyedDropout(0.0, some_keys(14), 1))
    assert causal_attention(*tensors, options).equal(causal_attention(*tensors))
    rows = routed_indices("some", 2, 7)
    flat = tensors[0].transpose(1, 2).flatten(0, 1)[rows]
    dropout = KeyedDropout(0.0, some_keys(14)[rows], 1)
    got, expected = (
        routed_attention(flat, *tensors[1:], RoutedRows(rows, 2, 7), AttentionOptions(d)) for d in (dropout, None)
    )
    assert got.equal(expected)


def test_gradcheck_of_attention_with_dropout():
    q, k, v = inputs(2, 5, 5)
    rows = torch.tensor([1, 2, 4, 8])
    flat = q.detach().transpose(1, 2).flatten(0, 1).index_select(0, rows).requires_grad_()
    options = AttentionOptions(keyed(2, 5).select(rows), first_head=1)
    assert torch.autograd.gradcheck(lambda *t: routed_attention(*t, RoutedRows(rows, 2, 5), options), (flat, k, v))


def test_probabilities_of_far_apart_scores_stay_finite():
    q, k, v = (t.detach() for t in inputs(1, 9, 9))
    tensors = [t.float().requires_grad_() for t in (q * 1e4, k, v)]
    got = causal_attention(*tensors, AttentionOptions(keyed(1, 9)))
    expected = dense_oracle(*(t.double() for t in tensors), None, masks(1, 9, 9), RATE)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-2)  # scores of 10^4 are exact to 10^-3
    got.sum().backward()
    assert all(t.grad.isfinite().all() for t in tensors)


@pytest.mark.parametrize("products", ("wide", "16 bits"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_dropout_in_16_bits_is_near_the_dense_formula(monkeypatch, dtype, products):
    if products == "16 bits":  # as on a GPU
        monkeypatch.setattr(dropout_module, "_types", lambda q: (q.dtype, torch.float32))
    tensors = [t.detach().to(dtype).requires_grad_() for t in inputs(2, 16, 16)]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    expected = dense_oracle(*doubles, None, masks(2, 16, 16), RATE)
    got = causal_attention(*tensors, AttentionOptions(keyed(2, 16)))
    assert got.dtype == dtype
    direction = noise(*got.shape, seed=9).to(dtype)
    pairs = [(got, expected)]
    pairs += zip(
        torch.autograd.grad(got, tensors, direction),
        torch.autograd.grad(expected, doubles, direction.double()),
        strict=True,
    )
    step = torch.finfo(dtype).eps
    for g, e in pairs:
        assert g.dtype == dtype
        assert (g.double() - e).norm() < (1 if products == "wide" else 4) * step * e.norm()


def test_no_probabilities_are_kept_for_the_backward_pass():
    queries = 300
    q, k, v = inputs(1, queries, queries)
    rows = routed_indices("some", 1, queries)
    flat = q.transpose(1, 2).flatten(0, 1).index_select(0, rows)
    dropout = keyed(1, queries)

    def largest_kept(function, *arguments, **options) -> int:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t
        ):
            function(*arguments, **options)
        return max(kept) // q.element_size()

    assert largest_kept(F.scaled_dot_product_attention, q, k, v, dropout_p=RATE) >= queries * queries  # it is seen
    assert largest_kept(causal_attention, q, k, v, AttentionOptions(dropout)) == q.numel()
    options = AttentionOptions(dropout.select(rows))
    assert largest_kept(routed_attention, flat, k, v, RoutedRows(rows, 1, queries), options) == q.numel()


@pytest.mark.parametrize("routing", ("some", "all"))
def test_dropout_leaves_out_attention_probabilities_at_its_rate(routing):
    queries, rate, heads = 64, 0.25, 2000
    q, k = (torch.zeros(1, heads, queries, 1) for _ in range(2))
    v = torch.ones(1, heads, queries, 1)
    rows = routed_indices(routing, 1, queries)
    options = AttentionOptions(KeyedDropout(rate, some_keys(queries)[rows], SITE))
    # Every head is a run of its own.
    runs = routed_attention(q[0].transpose(0, 1)[rows], k, v, RoutedRows(rows, 1, queries), options)[..., 0].T
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


def test_keys_are_rotated_and_values_are_not():
    cos, sin = (table[:, None] for table in rotary_table(5, 6, 100.0, torch.device("cpu"), torch.float64))
    kv = noise(2, 5, 2, 3, 6).requires_grad_()
    keys, values = keys_and_values(kv, cos, sin)
    torch.testing.assert_close(keys, rotate(kv[:, :, 0], cos, sin), rtol=0, atol=0)
    torch.testing.assert_close(values, kv[:, :, 1], rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda x: keys_and_values(x, cos, sin), kv)


# Parting and joining rows --------------------------------------------------------------------------------------------


def test_parting_and_joining_rows_and_their_gradients():
    x, order, sizes = noise(7, 3).requires_grad_(), torch.tensor([3, 1, 6, 0, 2, 5, 4]), [4, 0, 3]
    parts = permute(x, order, sizes)
    for part, rows in zip(parts, order.split(sizes), strict=True):
        torch.testing.assert_close(part, x[rows], rtol=0, atol=0)
    torch.testing.assert_close(unpermute(parts, order), x, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda t: permute(t, order, sizes), x)
    assert torch.autograd.gradcheck(lambda *t: unpermute(t, order), [part.detach().requires_grad_() for part in parts])


# Documents -----------------------------------------------------------------------------------------------------------


def documents(sequences: int, length: int) -> torch.Tensor:
    """Where the document of each position begins: of the last sequence all are one."""
    opens = torch.rand(sequences, length, generator=torch.Generator().manual_seed(4)) < 0.3
    opens[-1] = False
    return (opens * torch.arange(length)).cummax(1).values


@pytest.mark.parametrize("dropped", (False, True))
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("length", (1, 13, 70))
def test_attention_keeps_to_documents(way, length, routing, dropped):
    """Of all rows, of routed ones to all, and of routed ones to each other."""
    sequences = 3
    tensors, document_starts = inputs(sequences, length, length), documents(sequences, length)
    rows = routed_indices(routing, sequences, length)
    dropout, stays = (keyed(sequences, length), masks(sequences, length, length)) if dropped else (None, None)

    def expected() -> torch.Tensor:
        return dense_oracle(*tensors, None, stays, RATE, document_starts)

    assert_same(
        causal_attention(*tensors, AttentionOptions(dropout, document_starts=document_starts)), expected(), tensors
    )
    of_rows = AttentionOptions(dropout and dropout.select(rows), document_starts=document_starts.flatten()[rows])
    routed_rows = RoutedRows(rows, sequences, length)
    q, k, v = (x.transpose(1, 2).flatten(0, 1)[rows] for x in tensors)
    got = routed_attention(q, *tensors[1:], routed_rows, of_rows)
    assert_same(got, expected().transpose(1, 2).flatten(0, 1)[rows], tensors)
    if dropped:  # its columns are numbered in the packed order
        return
    routed = torch.zeros(sequences * length, dtype=torch.bool).index_fill(0, rows, True).view(sequences, 1, 1, length)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1) | (
        torch.arange(length) < document_starts[:, None, :, None]
    )
    products = (tensors[0] @ tensors[1].mT / math.sqrt(CHANNELS)).masked_fill(hidden | ~routed, -1e300)
    expected = (products.softmax(-1) @ tensors[2]).transpose(1, 2).flatten(0, 1)[rows]
    q, k, v = (x.transpose(1, 2).flatten(0, 1)[rows] for x in tensors)
    got = routed_self_attention(q, k, v, routed_rows, of_rows)
    assert_same(got, expected, tensors)


@pytest.mark.parametrize("chunk", (3, 256))
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (3, 7)])
def test_masked_sdpa_is_the_dense_formula(monkeypatch, chunk, queries, keys):
    """It serves GPUs without Triton; here it is run on a CPU."""
    monkeypatch.setattr(masked_module, "QUERY_CHUNK", chunk)
    tensors = inputs(3, queries, keys)
    positions = torch.arange(keys - queries, keys).expand(3, -1)
    document_starts = documents(3, keys)[:, keys - queries :]
    for starts in (None, document_starts):
        got = masked_module.masked_sdpa(*tensors, positions, starts, scale=None)
        assert_same(got, dense_oracle(*tensors, document_starts=starts), tensors)
