"""An interpolated bigram model: what a language model must beat to have learned more than word pairs.

Interpolated Kneser-Ney with counts ``c``::

    p(b | a) = max(c(a, b) - D, 0) / c(a) + D t(a) / c(a) * q(b)

``t(a)`` is the number of distinct followers of ``a``; ``q(b)`` is proportional to the number of distinct tokens before
``b`` plus one. The discount ``D`` is the best of a grid on the validation set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

DISCOUNTS = tuple(i / 20 for i in range(1, 20))


@dataclass(frozen=True)
class Bigram:
    """Counts of a training stream.

    Attributes:
        pairs: (P,) int64 sorted, ``a * V + b`` of each pair that occurs.
        counts: (P,) float64, how often.
        total: (V,) occurrences of ``a`` before another token.
        followers: (V,) distinct tokens after ``a``.
        continuation: (V,) probability ``q``.
    """

    pairs: np.ndarray
    counts: np.ndarray
    total: np.ndarray
    followers: np.ndarray
    continuation: np.ndarray

    def probability(self, before: np.ndarray, after: np.ndarray, discount: float) -> np.ndarray:
        """``p(after | before)`` elementwise, float64."""
        key = before * len(self.total) + after
        index = np.minimum(np.searchsorted(self.pairs, key), len(self.pairs) - 1)
        count = np.where(self.pairs[index] == key, self.counts[index], 0.0)
        total = self.total[before]
        seen = total > 0
        total = np.where(seen, total, 1.0)
        direct = np.maximum(count - discount, 0) / total
        rest = np.where(seen, discount * self.followers[before] / total, 1.0)
        return direct + rest * self.continuation[after]

    def perplexity(self, tokens: np.ndarray, discount: float) -> float:
        """exp of the mean cross-entropy of every token after the first of a stream."""
        tokens = np.asarray(tokens, np.int64)
        return math.exp(-np.log(self.probability(tokens[:-1], tokens[1:], discount)).mean())


def fit_bigram(tokens: np.ndarray, vocab_size: int) -> Bigram:
    """Count the pairs of a stream of ids below ``vocab_size``."""
    tokens = np.asarray(tokens, np.int64)
    pairs, counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    followers = np.bincount(pairs // vocab_size, minlength=vocab_size)
    leaders = np.bincount(pairs % vocab_size, minlength=vocab_size) + 1.0
    total = np.bincount(tokens[:-1], minlength=vocab_size).astype(np.float64)
    return Bigram(pairs, counts.astype(np.float64), total, followers, leaders / leaders.sum())


def best_discount(model: Bigram, validation: np.ndarray) -> float:
    """The discount of the grid with the least perplexity on ``validation``."""
    return min(DISCOUNTS, key=lambda discount: model.perplexity(validation, discount))
