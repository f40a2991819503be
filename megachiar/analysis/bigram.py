"""An interpolated bigram model: a language model that does not beat it has learned only which token follows which.

The model is modified Kneser-Ney (Chen and Goodman, 1999), the strongest of the usual interpolated bigrams::

    p(b | a) = (c(a, b) - D(c(a, b))) / c(a) + r(a) q(b)

Here ``c`` are counts. ``D`` is a discount, one each for pairs seen once, twice and more often. ``r(a)`` is the share
of probability that the discounts free after ``a``, so that weights depend on the context. ``q(b)`` is proportional to
the number of distinct tokens before ``b``, plus one. The counts come from the training set. The discounts have the
highest likelihood on the validation set.

Shapes: V = vocabulary size, P = number of distinct pairs, n = number of tokens scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megachiar.data.sampling.dataset import TokenSource, ValidationSet
from megachiar.data.storage.files import bin_path
from megachiar.data.storage.manifest import check_same_tokenizer
from megachiar.errors import UserError

CLASSES = 3
"""Number of discounts: for pairs seen once, twice, and three times or more."""
_LEAST_DISCOUNT = 1e-3  # it is above 0, so that every pair has a probability
_START = (0.5, 1.0, 1.5)
_GOLDEN = (math.sqrt(5) - 1) / 2
_PRECISION = 1e-4  # of a discount
_GAIN = 1e-7  # nats per token; the search ends after a sweep that gains less


class Terms(NamedTuple):
    """The probabilities of n tokens as a linear function of the discounts: ``base + slopes @ discounts``.

    Attributes:
        base: probabilities at discounts of 0, (n,) float64.
        slopes: change of each probability with each discount, (n, CLASSES) float64.
    """

    base: np.ndarray
    slopes: np.ndarray

    def nats(self, discounts: np.ndarray) -> float:
        """Return the mean negative log-likelihood in nats per token at ``discounts``, (CLASSES,) float64.

        It is convex in the discounts, since the log of a linear function is concave.
        """
        return float(-np.log(self.base + self.slopes @ discounts).mean())


@dataclass(frozen=True)
class Bigram:
    """The counts of a training stream.

    Attributes:
        pairs: ``a * V + b`` of each pair that occurs, sorted, (P,) int64.
        counts: how often each pair occurs, (P,) int64.
        total: how often each token stands before another one, (V,) int64.
        followers: number of distinct tokens after each token, by class of the pair, (V, CLASSES) int64.
        continuation: ``q`` of each token, (V,) float64.
    """

    pairs: np.ndarray
    counts: np.ndarray
    total: np.ndarray
    followers: np.ndarray
    continuation: np.ndarray

    def terms(self, before: np.ndarray, after: np.ndarray) -> Terms:
        """Return ``p(after | before)`` as a function of the discounts; both arguments are ids, int64 (n,)."""
        total = self.total[before]
        seen = total > 0
        share = 1.0 / np.maximum(total, 1)
        count = self._count(before, after)
        q = self.continuation[after]
        slopes = self.followers[before] * (share * q)[:, None]
        known = np.flatnonzero(count)
        slopes[known, np.minimum(count[known], CLASSES) - 1] -= share[known]
        return Terms(np.where(seen, count * share, q), slopes)

    def _count(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        key = before * len(self.total) + after
        index = np.minimum(np.searchsorted(self.pairs, key), len(self.pairs) - 1)
        return np.where(self.pairs[index] == key, self.counts[index], 0)

    def terms_of(self, tokens: np.ndarray) -> Terms:
        """Return the terms of every token of a stream but the first, the same that a ``ValidationSet`` predicts."""
        tokens = np.asarray(tokens, np.int64)
        return self.terms(tokens[:-1], tokens[1:])


def fit_bigram(tokens: np.ndarray, vocab_size: int) -> Bigram:
    """Count the pairs of ``tokens``, a stream of at least two ids from 0 to ``vocab_size - 1``, (tokens,)."""
    tokens = np.asarray(tokens, np.int64)
    pairs, counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    first = pairs // vocab_size
    cell = first * CLASSES + np.minimum(counts, CLASSES) - 1
    leaders = np.bincount(pairs % vocab_size, minlength=vocab_size) + 1.0
    return Bigram(
        pairs=pairs,
        counts=counts,
        total=np.bincount(tokens[:-1], minlength=vocab_size),
        followers=np.bincount(cell, minlength=vocab_size * CLASSES).reshape(vocab_size, CLASSES),
        continuation=leaders / leaders.sum(),
    )


def fit_discounts(terms: Terms) -> np.ndarray:
    """Return the discounts, (CLASSES,) float64, under which ``terms`` are most likely.

    A golden-section search optimizes one discount after the other, until a sweep over all gains nothing. The problem is
    convex, so that it has one minimum. A pair of class k was seen at least k times, so that a discount of at most k
    leaves no count below 0.
    """
    discounts = np.array(_START)
    best = terms.nats(discounts)
    while True:
        for number in range(CLASSES):
            discounts[number] = _best_coordinate(terms, discounts, number)
        found = terms.nats(discounts)
        if best - found < _GAIN:
            return discounts
        best = found


def _best_coordinate(terms: Terms, discounts: np.ndarray, number: int) -> float:
    """Return the best value of discount ``number`` with all others as they are."""
    rest = discounts.copy()
    rest[number] = 0
    base, slope = terms.base + terms.slopes @ rest, terms.slopes[:, number]

    def nats(value: float) -> float:
        return float(-np.log(base + slope * value).mean())

    low, high = _LEAST_DISCOUNT, float(number + 1) - _LEAST_DISCOUNT
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = nats(left), nats(right)
    while high - low > _PRECISION:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = nats(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = nats(right)
    return (low + high) / 2


@dataclass(frozen=True)
class Baseline:
    """The score of an interpolated bigram on a test set.

    Attributes:
        token_ppl: perplexity per token of the test set, without its first token.
        valid_token_ppl: the same of the validation set, which the discounts were fitted on.
        tokens: number of tokens scored in the test set.
        vocab_size: number of ids whose probabilities sum to 1.
        discounts: for pairs seen once, twice, and more often.
    """

    token_ppl: float
    valid_token_ppl: float
    tokens: int
    vocab_size: int
    discounts: tuple[float, ...]


def bigram_baseline(train: Path, valid: Path, test: Path, vocab_size: int | None = None) -> Baseline:
    """Fit a bigram on dataset ``train``, its discounts on ``valid``, and score ``test``.

    Args:
        train, valid, test: prefixes of indexed datasets.
        vocab_size: number of ids; None takes the largest vocabulary that a manifest records, or else the largest id in
            the datasets plus 1.

    Raises:
        UserError: a dataset is damaged or too short, the tokenizers differ, or an id is outside the vocabulary.
    """
    sets = [ValidationSet(prefix, 1) for prefix in (train, valid, test)]
    sources = [each.source for each in sets]
    if vocab_size is not None:
        _check_vocabulary(sources, vocab_size)
    check_same_tokenizer([(source.prefix, source.manifest) for source in sources])
    size = vocab_size or _vocabulary(sources)
    for source in sources:
        _check_ids(source, size)
    model = fit_bigram(sources[0].dataset.tokens, size)
    on_valid, on_test = (model.terms_of(source.dataset.tokens) for source in sources[1:])
    discounts = fit_discounts(on_valid)
    return Baseline(
        token_ppl=math.exp(on_test.nats(discounts)),
        valid_token_ppl=math.exp(on_valid.nats(discounts)),
        tokens=sets[-1].targets,
        vocab_size=size,
        discounts=tuple(discounts.tolist()),
    )


def _vocabulary(sources: list[TokenSource]) -> int:
    known = [source.manifest.tokenizer.vocab_size for source in sources if source.manifest]
    return max(known, default=0) or 1 + max(int(source.dataset.tokens.max()) for source in sources)


def _check_vocabulary(sources: list[TokenSource], vocab_size: int) -> None:
    """Check that no tokenizer has more ids than the option ``--vocab-size`` gives."""
    needed = max((source.manifest.tokenizer.vocab_size for source in sources if source.manifest), default=0)
    if needed > vocab_size:
        problem = f"the datasets' tokenizer has {needed:,} ids"
        raise UserError(f"--vocab-size {vocab_size}", problem, f"give at least {needed}, or leave it out")


def _check_ids(source: TokenSource, vocab_size: int) -> None:
    tokens = source.dataset.tokens
    least, largest = int(tokens.min()), int(tokens.max())
    if least < 0 or largest >= vocab_size:
        wrong, remedy = (least, "") if least < 0 else (largest, f"give --vocab-size {largest + 1} or more, or ")
        raise UserError(
            bin_path(source.prefix),
            f"holds id {wrong}, but the vocabulary is 0 to {vocab_size - 1:,}",
            f"{remedy}check the file with `megachiar inspect`",
        )
