"""The bigram baseline agrees with counts made by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import product
from pathlib import Path

import indexed_oracle as oracle
import numpy as np
import pytest
from support import python

from megachiar.analysis.bigram import bigram_baseline, fit_bigram, fit_discounts
from megachiar.data.sampling.dataset import ValidationSet
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import UserError

VOCABULARY = 13
PARTS = ("train", "valid", "test")


def stream(seed: int, length: int = 400) -> np.ndarray:
    """Draw tokens 0 to 10, each with a preferred follower; 11 and 12 never occur."""
    rng = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(length - 1):
        tokens.append((tokens[-1] * 2 + 1) % 11 if rng.random() < 0.6 else int(rng.integers(11)))
    return np.array(tokens)


def by_hand(train: np.ndarray, test: np.ndarray, discounts: tuple[float, float, float]) -> float:
    """Return the perplexity of modified Kneser-Ney from dictionaries, one pair at a time."""
    pairs = Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    before = Counter(train[:-1].tolist())
    leaders = {b: len({a for a, c in pairs if c == b}) + 1 for b in range(VOCABULARY)}
    nats = 0.0
    for a, b in zip(test[:-1].tolist(), test[1:].tolist(), strict=True):
        q = leaders[b] / sum(leaders.values())
        freed = sum(discounts[min(count, 3) - 1] for (left, _), count in pairs.items() if left == a)
        count = pairs[a, b]
        kept = count - discounts[min(count, 3) - 1] if count else 0.0
        nats -= math.log((kept + freed * q) / before[a] if before[a] else q)
    return math.exp(nats / (len(test) - 1))


def write(folder: Path, streams: dict[str, np.ndarray]) -> list[Path]:
    for part, tokens in streams.items():
        with IndexedDatasetBuilder(folder / part, np.uint16) as builder:
            builder.add_document(tokens[: len(tokens) // 2])
            builder.add_document(tokens[len(tokens) // 2 :])
    return [folder / part for part in streams]


@pytest.fixture
def streams() -> dict[str, np.ndarray]:
    """Draw streams of which the test stream has tokens, and a context, that training never saw."""
    unseen = np.array([12, 12, 2, 11, 0])
    return {"train": stream(0), "valid": stream(2), "test": np.append(stream(1), unseen)}


@pytest.mark.parametrize("discounts", [(0.1, 0.1, 0.1), (0.75, 1.1, 1.4)])
def test_perplexity_is_that_of_counts_made_by_hand(discounts, streams):
    nats = fit_bigram(streams["train"], VOCABULARY).terms_of(streams["test"]).nats(np.array(discounts))
    assert math.exp(nats) == pytest.approx(by_hand(streams["train"], streams["test"], discounts), rel=1e-12)


def test_probabilities_sum_to_one_after_every_token():
    model, discounts = fit_bigram(stream(0), VOCABULARY), np.array([0.6, 0.9, 1.3])
    for token in range(VOCABULARY):
        terms = model.terms(np.full(VOCABULARY, token), np.arange(VOCABULARY))
        probabilities = terms.base + terms.slopes @ discounts
        assert probabilities.min() > 0
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)


def test_no_discounts_of_a_fine_grid_are_better():
    terms = fit_bigram(stream(0), VOCABULARY).terms_of(stream(2))
    found = terms.nats(fit_discounts(terms))
    grid = (np.linspace(0.02, k - 0.02, 25) for k in (1, 2, 3))
    assert found <= min(terms.nats(np.array(point)) for point in product(*grid)) + 1e-6


def test_a_useless_training_set_is_discounted_away():
    """Where no training pair occurs again, the discounts go to their upper limits 1, 2 and 3."""
    train = np.concatenate([[0, 5, 1, 6, 0, 5, 1, 6, 0, 7], np.arange(11)])
    terms = fit_bigram(train, VOCABULARY).terms_of(np.tile([0, 3, 9, 1], 50))
    assert fit_discounts(terms)[:2] == pytest.approx([1, 2], abs=0.01)


def test_it_is_better_than_counting_tokens_alone(streams):
    frequency = (np.bincount(streams["train"], minlength=VOCABULARY) + 1) / (len(streams["train"]) + VOCABULARY)
    unigram = math.exp(-np.log(frequency[streams["test"][1:]]).mean())
    terms = fit_bigram(streams["train"], VOCABULARY).terms_of(streams["test"])
    assert math.exp(terms.nats(np.array([0.5, 0.8, 1.2]))) < unigram - 2


def test_datasets_are_scored_over_exactly_the_targets_that_evaluation_has(tmp_path, streams):
    result = bigram_baseline(*write(tmp_path, streams), vocab_size=VOCABULARY)
    assert result.tokens == ValidationSet(tmp_path / "test", 32).targets == len(streams["test"]) - 1
    assert result.token_ppl == pytest.approx(by_hand(streams["train"], streams["test"], result.discounts), rel=1e-9)
    assert result.valid_token_ppl == pytest.approx(
        by_hand(streams["train"], streams["valid"], result.discounts), rel=1e-9
    )


def test_without_a_size_the_largest_id_sets_the_vocabulary(tmp_path, streams):
    assert bigram_baseline(*write(tmp_path, streams)).vocab_size == VOCABULARY


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path, streams):
    with pytest.raises(UserError, match=r"test\.bin: holds id 12, but the vocabulary is 0 to 11") as caught:
        bigram_baseline(*write(tmp_path, streams), vocab_size=12)
    assert "give --vocab-size 13 or more" in caught.value.remedy


def test_a_vocabulary_below_that_of_the_tokenizer_names_the_option(tmp_path):
    for number, name in enumerate(PARTS):
        oracle.write(tmp_path / name, [[stream(number).tolist()]])
        oracle.make_manifest(tmp_path / name, vocab_size=64)
    with pytest.raises(UserError, match="--vocab-size 20: the datasets' tokenizer has 64 ids") as caught:
        bigram_baseline(*(tmp_path / name for name in PARTS), vocab_size=20)
    assert caught.value.remedy == "give at least 64, or leave it out"


def test_the_tool_prints_what_the_package_finds(tmp_path, streams):
    paths = write(tmp_path, streams)
    arguments = [a for part in PARTS for a in (f"--{part}", tmp_path / part)]
    done = python("tools/bigram_baseline.py", *arguments, "--vocab-size", str(VOCABULARY), "--json")
    expected = bigram_baseline(*paths, vocab_size=VOCABULARY)
    found = json.loads(done.stdout)
    assert found["token_ppl"] == expected.token_ppl and found["tokens"] == expected.tokens
    table = python("tools/bigram_baseline.py", *arguments)
    assert f"test token PPL {expected.token_ppl:.2f} over" in table.stdout


def test_the_tool_refuses_a_missing_dataset_in_one_message(tmp_path, streams):
    paths = write(tmp_path, streams)
    done = python(
        "tools/bigram_baseline.py", "--train", tmp_path / "none", "--valid", paths[1], "--test", paths[2], "--json"
    )
    assert done.returncode == 2 and "none.idx" in done.stderr and "Traceback" not in done.stderr and not done.stdout
