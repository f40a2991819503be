"""Give a statistic over tokens an interval that is honest about how few of the tokens are independent.

The tokens of a text resemble one another in two ways: those of one sequence share a context, and those of one id share
an embedding. An interval over sequences alone takes a word that stands in all of them for many observations. So the
statistic is computed again without one sequence, without one token id, and without some tokens, and so on in turn (the
jackknife). Each set of results gives a variance, and the variance of the statistic is

    V = V(sequences) + V(token ids) - V(tokens)

(two-way clustering; Cameron, Gelbach and Miller 2011), and no less than that of the sequences or that of the ids.

Why not a bootstrap: the commonest ids make up much of a text. Where routes are a hash of the id, intervals of 95 % by a
bootstrap over sequences held the truth in 19 of 100 texts, by one over sequences and ids in 86, and these in 94. A
bootstrap also repeats tokens, which mutual information takes for dependence.

Shapes: n tokens, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Statistic = Callable[[np.ndarray], float]
"""A statistic of tokens with weights (n,), which say how often each is counted."""
QUANTILE = 1.96
"""Standard errors on each side of an interval of 95 %."""
LARGE_CLUSTERS, GROUPS_OF_OTHERS = 60, 40
"""The largest clusters are left out one at a time, the others in so many groups: 100 computations for any text."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval of 95 %; all three are nan where the number does not exist.

    Attributes:
        value: of the tokens that were measured.
        low, high: ends of the interval.
    """

    value: float
    low: float
    high: float

    def is_above(self, bound: float) -> bool:
        """Return whether the whole interval is above ``bound``."""
        return self.low > bound

    def is_below(self, bound: float) -> bool:
        """Return whether the whole interval is below ``bound``."""
        return self.high < bound

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


UNKNOWN = Estimate(value=float("nan"), low=float("nan"), high=float("nan"))


@dataclass(frozen=True)
class Clusters:
    """The sequence and the token id of each of n tokens.

    Attributes:
        sequence: (n,) numbers of sequences, any integers.
        token: (n,) token ids.
    """

    sequence: np.ndarray
    token: np.ndarray

    def select(self, chosen: np.ndarray) -> Clusters:
        """Return the clusters of the tokens at ``chosen``, a mask or indices."""
        return Clusters(sequence=self.sequence[chosen], token=self.token[chosen])


def estimate(statistic: Statistic, clusters: Clusters, seed: int) -> Estimate:
    """Return a statistic with its interval over sequences and token ids.

    Args:
        statistic: of the tokens, given their weights.
        clusters: of the tokens.
        seed: of the groups of small clusters that are left out together.
    """
    n = len(clusters.sequence)
    value = statistic(np.ones(n)) if n else float("nan")
    if not np.isfinite(value):
        return UNKNOWN
    rng = np.random.default_rng([seed, n])
    by_sequence = _variance(statistic, value, _groups(clusters.sequence, rng))
    by_token = _variance(statistic, value, _groups(clusters.token, rng))
    by_itself = _variance(statistic, value, _groups(np.arange(n), rng))
    margin = QUANTILE * max(by_sequence + by_token - by_itself, by_sequence, by_token) ** 0.5
    return Estimate(value=value, low=value - margin, high=value + margin)


def _groups(cluster: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the group (n,) from 0 in which each token is left out: those of one cluster (n,) are in one group."""
    _, number, sizes = np.unique(cluster, return_inverse=True, return_counts=True)
    large = min(LARGE_CLUSTERS, len(sizes))
    groups = np.empty(len(sizes), np.int64)
    order = np.argsort(-sizes, kind="stable")
    groups[order[:large]] = np.arange(large)
    others = len(sizes) - large
    groups[order[large:]] = large + rng.permutation(others) % min(GROUPS_OF_OTHERS, max(others, 1))
    return groups[number]


def _variance(statistic: Statistic, value: float, group: np.ndarray) -> float:
    """Return the variance of a statistic of the given value by leaving out each group (n,) in turn.

    Groups differ in size, so that no factor (G - 1) / G is right for all; without it the variance errs upwards.
    """
    groups = int(group.max()) + 1
    if groups == 1:  # a single cluster says nothing about others
        return float("inf")
    values = np.array([statistic((group != left_out).astype(np.float64)) for left_out in range(groups)])
    return float(np.nansum((values - value) ** 2))


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Return the mean of ``values`` (n,) with ``weights`` (n,); nan where all weights are 0."""
    total = float(weights.sum())
    return float(weights @ values) / total if total > 0 else float("nan")


def correlation(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> float:
    """Return Pearson's correlation of two numbers (n,) of each token; nan where one of them does not vary."""
    x = first - weighted_mean(first, weights)
    y = second - weighted_mean(second, weights)
    scale = float(weights @ x**2) * float(weights @ y**2)
    return float(weights @ (x * y)) / scale**0.5 if scale > 0 else float("nan")


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks (n,) of numbers, float64, where equal numbers share their mean rank.

    Pearson's correlation of ranks is Spearman's.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
