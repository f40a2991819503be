"""Intervals hold the truth as often as they say, and measures equal those of scipy or of tables worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from megachiar.analysis.calibration import correlation_within
from megachiar.analysis.information import mutual_information, route_entropy, route_information, unknowing_routes
from megachiar.analysis.regret import regret, regret_of_scores
from megachiar.analysis.resampling import Clusters, correlation, estimate, ranks, weighted_mean


def zipf(rng: np.random.Generator, tokens: int, vocabulary: int = 1500) -> np.ndarray:
    """Token ids of which the k-th is 1/k as frequent as the first."""
    shares = 1 / np.arange(1, vocabulary + 1)
    return rng.choice(vocabulary, tokens, p=shares / shares.sum())


def clusters_of(ids: np.ndarray, sequences: int) -> Clusters:
    return Clusters(sequence=np.repeat(np.arange(sequences), len(ids) // sequences), token=ids)


# Plain statistics ----------------------------------------------------------------------------------------------------


def test_rank_correlation_is_spearmans_and_weights_are_repetitions():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 20, 200), rng.integers(0, 20, 200) + rng.normal(0, 9, 200)
    assert ranks(x).tolist() == scipy.stats.rankdata(x).tolist()
    expected = scipy.stats.spearmanr(x, y).statistic
    assert correlation(ranks(x), ranks(y), np.ones(200)) == pytest.approx(expected, abs=1e-12)
    times = rng.integers(0, 4, 200)
    expected = np.corrcoef(np.repeat(x, times), np.repeat(y, times))[0, 1]
    assert correlation(x, y, times.astype(float)) == pytest.approx(expected, abs=1e-12)
    assert weighted_mean(y, times.astype(float)) == pytest.approx(np.repeat(y, times).mean(), abs=1e-12)
    assert math.isnan(correlation(x, np.ones(200), np.ones(200)))


# Intervals -----------------------------------------------------------------------------------------------------------


def test_the_interval_of_independent_tokens_is_that_of_the_mean():
    rng = np.random.default_rng(1)
    values = rng.normal(3, 2, 4000)
    clusters = Clusters(sequence=np.repeat(np.arange(200), 20), token=rng.permutation(4000))
    found = estimate(lambda weights: weighted_mean(values, weights), clusters, seed=0)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(1.96 * 2 / 4000**0.5, rel=0.25)
    again = estimate(lambda weights: weighted_mean(values, weights), clusters, seed=0)
    assert again == found


def test_one_sequence_or_no_number_has_no_interval():
    values = np.arange(10.0)
    alone = Clusters(sequence=np.zeros(10, int), token=np.arange(10))
    assert math.isinf(estimate(lambda weights: weighted_mean(values, weights), alone, seed=0).high)
    assert math.isnan(estimate(lambda weights: math.nan, alone, seed=0).value)
    nothing = Clusters(sequence=np.empty(0, int), token=np.empty(0, int))
    assert math.isnan(estimate(lambda weights: 1.0, nothing, seed=0).value)


def test_a_hash_of_the_token_correlates_with_nothing_in_95_of_100_texts():
    """H is a number for each id, and the loss another one: few ids decide, whatever the number of tokens."""
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        ids = zipf(rng, 64 * 32)
        clusters = clusters_of(ids, 64)
        x = ranks(rng.normal(size=1500)[ids])
        loss = rng.normal(size=1500)[ids] + rng.normal(size=len(ids)) + 0.3 * rng.normal(size=64)[clusters.sequence]
        y = ranks(loss)
        found = estimate(lambda weights, x=x, y=y: correlation(x, y, weights), clusters, seed=0)
        covered += found.low <= 0 <= found.high
    assert covered >= 91  # 94.5 of 100 are expected; fewer than 91 happen once in 20 times of 95


def test_a_true_relation_is_found():
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ids = zipf(rng, 64 * 32)
        entropy = rng.normal(size=1500)[ids]
        x, y = ranks(entropy), ranks(entropy + 0.5 * rng.normal(size=len(ids)))
        relation = estimate(lambda weights, x=x, y=y: correlation(x, y, weights), clusters_of(ids, 64), seed=0)
        found.append(relation.is_above(0))
    assert all(found)


# Mutual information --------------------------------------------------------------------------------------------------


def test_mutual_information_is_that_of_the_table():
    first, second = np.array([0, 0, 0, 1, 1, 1, 1, 1]), np.array([0, 0, 1, 0, 1, 1, 1, 1])
    table = np.array([[2, 1], [1, 4]]) / 8
    expected = (table * np.log2(table / np.outer(table.sum(1), table.sum(0)))).sum()
    assert mutual_information(first, second, np.ones(8)) == pytest.approx(expected, abs=1e-12)
    assert route_entropy(first, np.ones(8)) == pytest.approx(scipy.stats.entropy([3, 5], base=2), abs=1e-12)
    times = np.array([2, 0, 3, 1, 1, 0, 2, 4])
    repeated = mutual_information(np.repeat(first, times), np.repeat(second, times), np.ones(times.sum()))
    assert mutual_information(first, second, times.astype(float)) == pytest.approx(repeated, abs=1e-12)


def test_a_route_that_is_a_function_of_the_id_is_explained_by_it_and_by_nothing_else():
    rng = np.random.default_rng(5)
    ids = zipf(rng, 64 * 64)
    route = (rng.random(1500) < 0.5).astype(np.int64)[ids]
    clusters = clusters_of(ids, 64)
    by_id = route_information(route, ids, clusters, seed=0, is_token=True)
    assert by_id.bits == pytest.approx(by_id.route_bits, abs=1e-12)
    assert by_id.explained.value == pytest.approx(1.0) and by_id.p_value == pytest.approx(1 / 201)
    position = np.tile(np.arange(64) // 8, 64)
    by_position = route_information(route, position, clusters, seed=0)
    assert by_position.p_value > 0.01 and by_position.explained.low < 0 < by_position.explained.high


def test_a_feature_that_gives_a_fifth_of_the_route_away_is_said_to_explain_it():
    """Routes that follow one bit with probability p tell 1 - h(p) bits of it, where h is the binary entropy."""
    rng = np.random.default_rng(6)
    bit = rng.integers(0, 2, 20_000)
    route = np.where(rng.random(20_000) < 0.76, bit, 1 - bit)
    clusters = Clusters(sequence=np.repeat(np.arange(200), 100), token=rng.integers(0, 3000, 20_000))
    found = route_information(route, bit, clusters, seed=0)
    expected = 1 - scipy.stats.entropy([0.76, 0.24], base=2)
    assert found.explained.value == pytest.approx(expected, abs=0.02)
    assert found.explained.low < expected < found.explained.high
    assert found.p_value < 0.01


def test_a_hash_of_the_id_is_not_said_to_know_the_kind_of_word():
    """The kind of a word is a function of its id, as the route is: the plain test over tokens would call this known."""
    known = fooled = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        ids = zipf(rng, 64 * 32)
        route = (rng.random(1500) < 0.5).astype(np.int64)[ids]
        kind = rng.integers(0, 6, 1500)[ids]
        known += route_information(route, kind, clusters_of(ids, 64), seed=seed, draws=100).p_value <= 0.01
        fooled += scipy.stats.chi2_contingency(np.histogram2d(route, kind, (2, 6))[0]).pvalue <= 0.01
    assert known <= 3 and fooled >= 35


def test_routes_that_know_nothing_keep_shares_and_likeness():
    rng = np.random.default_rng(8)
    ids = rng.integers(0, 500, 40_000)
    shares = np.array([0.2, 0.5, 0.3])
    drawn = unknowing_routes(shares, ids, 0.3, rng)
    assert np.bincount(drawn) / 40_000 == pytest.approx(shares, abs=0.03)
    for operator in range(3):
        assert correlation_within((drawn == operator).astype(float), ids) == pytest.approx(0.3, abs=0.04)
    assert len(np.unique(unknowing_routes(shares, ids, 1.0, rng)[ids == ids[0]])) == 1


# Regret --------------------------------------------------------------------------------------------------------------

VALUES = np.array([4.0, -2.0, 1.0, 0.0, 3.0])


@pytest.mark.parametrize(
    ("attends", "expected"),
    [
        ([1, 0, 0, 0, 1], 0.0),  # the two highest: the oracle
        ([0, 1, 0, 1, 0], 9 / 4.6),  # the two lowest: -2 in place of 7, and a coin has 2.4
        ([1, 0, 0, 1, 0], 3 / 4.6),
        ([1, 1, 1, 1, 1], math.nan),
        ([0, 0, 0, 0, 0], math.nan),
    ],
)
def test_regret_of_five_tokens_by_hand(attends, expected):
    assert regret(VALUES, np.array(attends, bool)) == pytest.approx(expected, nan_ok=True)


def test_the_mean_regret_of_a_coin_is_1():
    rng = np.random.default_rng(9)
    values = rng.standard_t(3, 200)
    regrets = [regret(values, rng.permutation(200) < 70) for _ in range(3000)]
    assert np.mean(regrets) == pytest.approx(1.0, abs=0.01)


def test_regret_with_weights_is_that_of_repeated_tokens():
    rng = np.random.default_rng(10)
    values, attends, times = rng.normal(size=50), rng.random(50) < 0.4, rng.integers(0, 4, 50)
    expected = regret(np.repeat(values, times), np.repeat(attends, times))
    assert regret(values, attends, times.astype(float)) == pytest.approx(expected)


def test_scores_are_judged_at_a_share():
    assert regret_of_scores(VALUES, VALUES, 0.4) == pytest.approx(0.0)
    assert regret_of_scores(VALUES, -VALUES, 0.4) == pytest.approx(9 / 4.6)
    assert regret_of_scores(np.zeros(5), VALUES, 0.4) != regret_of_scores(np.zeros(5), VALUES, 0.4)  # nan
