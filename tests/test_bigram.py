"""The bigram baseline against counts made by hand."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from support import python

from megachiar.data.indexed import IndexedDatasetBuilder
from megachiar.training.bigram import DISCOUNTS, best_discount, fit_bigram

VOCABULARY = 7


def stream(seed: int, length: int = 400) -> np.ndarray:
    """Tokens 0..5 with a preferred follower each; 6 never occurs."""
    rng = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(length - 1):
        tokens.append((tokens[-1] * 2 + 1) % 6 if rng.random() < 0.6 else int(rng.integers(6)))
    return np.array(tokens)


def by_hand(train: np.ndarray, test: np.ndarray, discount: float) -> float:
    """Perplexity from dictionaries, one pair at a time."""
    pairs = Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    before = Counter(train[:-1].tolist())
    leaders = {b: len({a for a, c in pairs if c == b}) + 1 for b in range(VOCABULARY)}
    nats = 0.0
    for a, b in zip(test[:-1].tolist(), test[1:].tolist(), strict=True):
        q = leaders[b] / sum(leaders.values())
        followers = len({c for d, c in pairs if d == a})
        if before[a]:
            p = max(pairs[a, b] - discount, 0) / before[a] + discount * followers / before[a] * q
        else:
            p = q
        nats -= math.log(p)
    return math.exp(nats / (len(test) - 1))


@pytest.mark.parametrize("discount", [0.1, 0.75])
def test_perplexity_is_that_of_counts_made_by_hand(discount):
    train, test = stream(0), np.append(stream(1), [6, 6, 2])
    model = fit_bigram(train, VOCABULARY)
    assert model.perplexity(test, discount) == pytest.approx(by_hand(train, test, discount), rel=1e-12)


def test_probabilities_sum_to_one_after_every_token():
    model = fit_bigram(stream(0), VOCABULARY)
    for token in range(VOCABULARY):
        after = np.arange(VOCABULARY)
        assert model.probability(np.full(VOCABULARY, token), after, 0.6).sum() == pytest.approx(1, abs=1e-12)


def test_the_discount_is_the_best_on_the_validation_set():
    model, valid = fit_bigram(stream(0), VOCABULARY), stream(2)
    chosen = best_discount(model, valid)
    assert all(model.perplexity(valid, chosen) <= model.perplexity(valid, other) for other in DISCOUNTS)


def test_it_is_better_than_counting_tokens_alone():
    train, test = stream(0), stream(1)
    frequency = np.bincount(train, minlength=VOCABULARY) / len(train)
    assert fit_bigram(train, VOCABULARY).perplexity(test, 0.5) < math.exp(-np.log(frequency[test[1:]]).mean()) - 0.5


def test_the_tool_scores_every_target(tmp_path):
    for number, part in enumerate(("train", "valid", "test")):
        with IndexedDatasetBuilder(tmp_path / part, np.uint16) as builder:
            builder.add_document(stream(number)[:200])
            builder.add_document(stream(number)[200:])
    arguments = [a for part in ("train", "valid", "test") for a in (f"--{part}", tmp_path / part)]
    done = python("tools/bigram_baseline.py", *arguments, "--json")
    found = json.loads(done.stdout)
    assert found["tokens"] == 399
    assert found["token_ppl"] == pytest.approx(by_hand(stream(0), stream(2), found["discount"]), rel=0.02)
