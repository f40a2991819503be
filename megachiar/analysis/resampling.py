"""Give a statistic over tokens an interval that is honest about how few of the tokens are independent.

The tokens of a text resemble one another in two ways: those of one sequence share a context, and those of one id share
an embedding. A bootstrap over sequences alone takes a word that stands in all of them for many observations. So three
bootstraps are made: over sequences, over token ids, and over tokens. Their variances add up to

    V = V(sequences) + V(token ids) - V(tokens)

(two-way clustering; Cameron, Gelbach and Miller 2011), and V is at least that of the sequences and that of the ids.

Shapes: n tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Statistic = Callable[[np.ndarray], float]
"""A statistic of tokens with weights (n,), which say how often each is counted."""
DRAWS = 200
"""Bootstrap samples of each kind; they put an error of some 5 % on the width of an interval."""
QUANTILE = 1.96
"""Standard errors on each side of an interval of 95 %."""
GROUPS = 20
"""Most groups of sequences that a jackknife leaves out one after another."""


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


def estimate(statistic: Statistic, clusters: Clusters, seed: int, draws: int = DRAWS) -> Estimate:
    """Return a statistic with an interval over sequences and token ids.

    A statistic that does not exist for some samples (nan) is judged by the others.

    Args:
        statistic: of the tokens, given their weights.
        clusters: of the tokens.
        seed: of the bootstraps.
        draws: samples of each bootstrap.
    """
    n = len(clusters.sequence)
    value = statistic(np.ones(n)) if n else float("nan")
    if not np.isfinite(value):
        return UNKNOWN
    rng = np.random.default_rng([seed, n])
    by_sequence = _variance(statistic, clusters.sequence, rng, draws)
    by_token = _variance(statistic, clusters.token, rng, draws)
    by_itself = _variance(statistic, np.arange(n), rng, draws)
    variance = max(by_sequence + by_token - by_itself, by_sequence, by_token)
    margin = QUANTILE * variance**0.5
    return Estimate(value=value, low=value - margin, high=value + margin)


def _variance(statistic: Statistic, cluster: np.ndarray, rng: np.random.Generator, draws: int) -> float:
    """Return the variance of a statistic when whole clusters (n,) are drawn with replacement."""
    _, group = np.unique(cluster, return_inverse=True)
    clusters = int(group.max()) + 1
    if clusters == 1:  # a single cluster says nothing about others
        return float("inf")
    values = []
    for _ in range(draws):
        times = np.bincount(rng.integers(clusters, size=clusters), minlength=clusters)
        values.append(statistic(times[group].astype(np.float64)))
    finite = [value for value in values if np.isfinite(value)]
    return float(np.var(finite, ddof=1)) if len(finite) > 1 else float("inf")


def jackknife(statistic: Statistic, sequence: np.ndarray) -> Estimate:
    """Return a statistic with an interval by leaving out groups of sequences (n,) one after another.

    It serves measures that take a repeated token for a dependence, such as mutual information: a bootstrap repeats
    tokens, and a jackknife does not.
    """
    value = statistic(np.ones(len(sequence)))
    _, number = np.unique(sequence, return_inverse=True)
    groups = min(GROUPS, int(number.max()) + 1)
    if groups == 1 or not np.isfinite(value):
        return UNKNOWN
    group = number % groups
    values = np.array([statistic((group != left_out).astype(np.float64)) for left_out in range(groups)])
    margin = QUANTILE * float((groups - 1) * np.mean((values - values.mean()) ** 2)) ** 0.5
    return Estimate(value=value, low=value - margin, high=value + margin)


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
    """Return the ranks (n,) of numbers, float64, equal numbers sharing their mean rank: Spearman's correlation is
    Pearson's of these."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]
