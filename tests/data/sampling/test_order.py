"""The order of samples: bijections, epochs, quotas and restarts, over random sizes and seeds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megachiar.data.permutation import permute, round_keys
from megachiar.data.sampling.order import BLOCK_SIZES, Blend, StreamOrder
from megachiar.errors import UserError

SIZES = [*range(1, 40), 63, 64, 65, 99, 100, 101, 255, 256, 257, 1_000, 4_095, 10_007, 65_536, 100_003]


@pytest.mark.parametrize("size", SIZES)
def test_permute_is_a_bijection_of_any_size(size):
    for seed in range(3):
        image = permute(np.arange(size), size, round_keys("test", seed))
        assert np.array_equal(np.sort(image), np.arange(size))


def test_permute_works_one_by_one_and_in_any_shape_and_order():
    size, keys = 1_009, round_keys("test", 7)
    whole = permute(np.arange(size), size, keys)
    chosen = np.random.default_rng(0).integers(0, size, (6, 5))
    assert np.array_equal(permute(chosen, size, keys), whole[chosen])
    assert [int(permute(np.int64(value), size, keys)) for value in range(20)] == whole[:20].tolist()
    assert permute(np.empty(0, np.int64), size, keys).shape == (0,)


def test_permute_handles_sizes_beyond_any_dataset():
    size = 10**13 + 37
    values = np.concatenate((np.arange(1000), size - 1 - np.arange(1000)))
    image = permute(values, size, round_keys("test", 1))
    assert len(np.unique(image)) == 2000 and image.min() >= 0 and image.max() < size
    assert abs(image.mean() / size - 0.5) < 0.05


def test_every_place_is_as_likely_for_every_value():
    """Chi-squared of (value -> place) over many keys; 99.99% of fair tables lie below the limit."""
    for size in (2, 3, 7, 10):
        table = np.zeros((size, size))
        trials = 3_000
        for seed in range(trials):
            table[np.arange(size), permute(np.arange(size), size, round_keys("test", seed))] += 1
        expected = trials / size
        statistic = ((table - expected) ** 2 / expected).sum()
        freedom = (size - 1) ** 2
        assert statistic < freedom + 3.9 * math.sqrt(2 * freedom) + 10, size


def test_neighbours_are_not_kept_together():
    size = 10_000
    image = permute(np.arange(size), size, round_keys("test", 5))
    assert abs(np.corrcoef(np.arange(size), image)[0, 1]) < 0.04
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.04
    assert (np.abs(np.diff(image)) == 1).sum() < 15  # 2 expected by chance


def test_keys_tell_every_name_apart():
    names = [("a", 1), ("a", 2), ("b", 1), ("a", 1, 0), ("a", 12), ("a", 1, 2), ("a1",), ("a", "1")]
    assert len({round_keys(*name).tobytes() for name in names}) == len(names)


def test_the_order_is_pinned():
    """A change here changes what every run in the world reads next: it needs a new option, not a new value."""
    assert permute(np.arange(10), 10, round_keys("test", 1234)).tolist() == [2, 8, 4, 5, 3, 1, 9, 7, 6, 0]
    order = StreamOrder(1_000, 32, (1234, 0))
    assert order.starts(np.array([0, 1, 30, 31, 62, 10**9])).tolist() == [832, 96, 736, 780, 140, 107]
    draws = Blend([0.7, 0.3], 1234).draws(np.arange(12))
    assert draws.sources.tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    assert draws.samples.tolist() == [0, 0, 1, 2, 1, 3, 4, 5, 6, 7, 8, 9]


def test_each_sample_comes_once_an_epoch_and_each_token_is_a_target_once():
    rng = np.random.default_rng(3)
    for _ in range(60):
        length = int(rng.integers(1, 40))
        tokens = int(rng.integers(length + 1, 30 * length + 2))
        order = StreamOrder(tokens, length, (int(rng.integers(1 << 40)), 0))
        n = order.samples_per_epoch
        assert n == (tokens - 1) // length
        for epoch in (0, 1, 2, 1_000):
            starts = order.starts(epoch * n + np.arange(n))
            assert (order.epochs(epoch * n + np.arange(n)) == epoch).all()
            targets = (starts[:, None] + 1 + np.arange(length)) % tokens
            assert len(np.unique(targets)) == n * length  # no token twice
            assert tokens - n * length <= length  # and at most T left out: T - 1, and the first one
            assert np.array_equal(np.unique((starts - order.shift(epoch)) % tokens), np.arange(n) * length)
        assert order.shift(0) == 0
        assert all(0 <= order.shift(epoch) < length for epoch in range(50))


def test_epochs_differ_in_order_and_cut():
    order = StreamOrder(100_001, 100, (0, 0))
    n = order.samples_per_epoch
    epochs = [order.starts(epoch * n + np.arange(n)) for epoch in range(4)]
    shifts = {order.shift(epoch) for epoch in range(20)}
    assert len(shifts) > 10
    for earlier, later in itertools.pairwise(epochs):
        assert (earlier // 100 == later // 100).mean() < 0.02


def test_seed_and_source_change_the_order():
    orders = [StreamOrder(10_001, 10, key).starts(np.arange(1000)) for key in ((1, 0), (2, 0), (1, 1))]
    assert all((orders[a] == orders[b]).mean() < 0.02 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_stream_shorter_than_a_sample_is_refused():
    assert StreamOrder(33, 32, (0, 0)).samples_per_epoch == 1
    with pytest.raises(UserError, match="32 tokens, but one sample of sequence length 32 takes 33"):
        StreamOrder(32, 32, (0, 0), "a.bin")


def random_weights(rng: np.random.Generator) -> list[float]:
    return (rng.random(rng.integers(1, 6)) ** 3 + 0.01).tolist()


def test_quotas_hold_in_every_block_and_samples_are_counted_up_without_gap():
    rng = np.random.default_rng(11)
    for _ in range(25):
        weights = random_weights(rng)
        blend = Blend(weights, int(rng.integers(1 << 40)))
        assert blend.block == blend.quotas.sum() and blend.block in BLOCK_SIZES
        assert np.abs(blend.quotas / blend.block / (np.array(weights) / sum(weights)) - 1).max() <= 1e-3
        blocks = max(1, 3_000 // blend.block)
        draws = blend.draws(np.arange(blocks * blend.block))
        for source in range(len(weights)):
            chosen = draws.sources == source
            per_block = chosen.reshape(blocks, -1).sum(1)
            assert (per_block == blend.quotas[source]).all()
            assert np.array_equal(draws.samples[chosen], np.arange(blocks * blend.quotas[source]))  # strictly in turn


def test_counts_are_what_was_drawn():
    rng = np.random.default_rng(12)
    for _ in range(20):
        weights = random_weights(rng)
        blend = Blend(weights, 5)
        positions = int(rng.integers(0, 3_000))
        drawn = np.bincount(blend.draws(np.arange(positions)).sources, minlength=len(weights))
        assert np.array_equal(blend.counts(positions), drawn)


def test_a_blend_restarts_anywhere():
    rng = np.random.default_rng(13)
    for _ in range(10):
        blend = Blend(random_weights(rng), 9)
        whole = blend.draws(np.arange(2_500))
        start = int(rng.integers(0, 2_000))
        part = Blend(blend.shares.tolist(), 9).draws(start + np.arange(300))
        assert np.array_equal(part.sources, whole.sources[start : start + 300])
        assert np.array_equal(part.samples, whole.samples[start : start + 300])


def test_blocks_are_as_small_as_the_weights_allow_and_differ():
    assert [Blend(weights, 0).block for weights in ([5], [1, 1], [0.7, 0.3], [1, 1, 1], [0.999, 0.001])] == [
        100,
        100,
        100,
        10_000,
        1_000,
    ]
    sources = Blend([1, 1], 0).draws(np.arange(300)).sources.reshape(3, 100)
    assert not (sources[0] == sources[1]).all() and not (sources[1] == sources[2]).all()


def test_a_tiny_weight_is_kept_and_one_that_would_never_be_drawn_refused():
    blend = Blend([1.0, 2e-5], 0)
    assert blend.quotas.tolist() == [99_998, 2]
    with pytest.raises(UserError, match="less than one sample in 100,000"):
        Blend([1.0, 1e-8], 0)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [math.nan], [math.inf, 1]])
def test_weights_must_be_positive(weights):
    with pytest.raises(UserError, match="each must be above 0"):
        Blend(weights, 0)
