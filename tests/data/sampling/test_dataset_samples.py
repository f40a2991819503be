"""Training samples and validation windows: right tokens, once each, from any position, and clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
from indexed_oracle import make_manifest, write, write_stream

from megachiar.data.sampling.dataset import ValidationSet, build_training_samples
from megachiar.errors import UserError


def test_samples_of_an_epoch_are_the_stream_cut_in_pieces(tmp_path):
    """With tokens that are their own place in the stream, a sample shows where it was read."""
    tokens, length = 1_003, 16
    prefix = write_stream(tmp_path / "a", np.arange(tokens), documents=9)
    stream = build_training_samples([(prefix, 1.0)], length, seed=4)
    n = (tokens - 1) // length
    for epoch in range(3):
        batch = stream.batch(range(epoch * n, (epoch + 1) * n))
        assert batch.shape == (n, length + 1) and batch.dtype == np.int64
        assert ((np.diff(batch, axis=1) - 1) % tokens == 0).all()  # consecutive, over the stream's end too
        assert len(np.unique(batch[:, 1:])) == n * length
    assert np.array_equal(np.sort(stream.batch(range(n))[:, 0]), np.arange(n) * length)


def test_some_sample_runs_over_the_end_of_the_stream(tmp_path):
    """Or the wrap-around in the test above was never used."""
    prefix = write_stream(tmp_path / "a", np.arange(1, 50))
    batch = build_training_samples([(prefix, 1.0)], 8, seed=0).batch(range(6 * 20))
    wrapped = [row for row in batch.tolist() if row[-1] < row[0]]
    assert wrapped and all(49 in row and row[row.index(49) + 1] == 1 for row in wrapped if row[-1] != 49)


def test_a_sample_is_the_same_alone_in_any_batch_and_after_a_restart(tmp_path):
    rng = np.random.default_rng(0)
    sources = [
        (write_stream(tmp_path / name, rng.integers(0, 60_000, size), documents=5), weight)
        for name, size, weight in (("a", 500, 0.5), ("b", 3_000, 0.4), ("c", 70, 0.1))
    ]
    whole = build_training_samples(sources, 12, seed=8).batch(range(700))
    for _ in range(20):
        stream = build_training_samples(sources, 12, seed=8)
        positions = rng.integers(0, 700, 9)
        assert np.array_equal(stream.batch(positions), whole[positions])
        assert np.array_equal(stream.sample(int(positions[0])), whole[positions[0]])
    assert not np.array_equal(build_training_samples(sources, 12, seed=9).batch(range(700)), whole)


def test_a_blend_takes_each_sample_of_each_source_once_an_epoch(tmp_path):
    """Over any sources, weights and sizes; values tell the source, places tell the sample."""
    rng = np.random.default_rng(5)
    for trial in range(15):
        length = int(rng.integers(2, 20))
        sizes = rng.integers(length + 1, 40 * length, rng.integers(1, 5))
        sources = [
            (write_stream(tmp_path / f"{trial}-{i}", i * 1_000 + np.arange(size), dtype="int32"), float(weight))
            for i, (size, weight) in enumerate(zip(sizes, rng.random(sizes.size) + 0.2, strict=True))
        ]
        stream = build_training_samples(sources, length, seed=trial)
        total = 1_200
        places, batch = stream.locate(range(total)), stream.batch(range(total))
        for number, use in enumerate(stream.describe(total)):
            mine = [k for k, place in enumerate(places) if place.source == number]
            assert use.samples == len(mine) and use.prefix == sources[number][0]
            assert use.epochs == len(mine) / use.samples_per_epoch
            assert use.samples_per_epoch == (sizes[number] - 1) // length
            for begin in range(0, len(mine), use.samples_per_epoch):
                epoch = mine[begin : begin + use.samples_per_epoch]
                assert len({places[k].epoch for k in epoch}) == 1
                targets = batch[epoch, 1:] - number * 1_000
                assert targets.min() >= 0 and targets.max() < sizes[number]
                assert len(np.unique(targets)) == targets.size


def test_sources_of_the_same_size_are_read_in_different_orders(tmp_path):
    """Parallel texts would otherwise come in pairs."""
    sources = [(write_stream(tmp_path / name, np.arange(5_000)), 1.0) for name in "ab"]
    places = build_training_samples(sources, 10, seed=1).locate(range(400))
    first, second = ([place.token for place in places if place.source == number] for number in (0, 1))
    assert len(first) == len(second) == 200
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 5


def test_describe_tells_shares_and_epochs(tmp_path):
    large = write_stream(tmp_path / "large", np.zeros(10_001, int))
    small = write_stream(tmp_path / "small", np.zeros(101, int))
    uses = build_training_samples([(large, 3), (small, 1)], 10, seed=0).describe(400)
    assert [(u.tokens, u.samples_per_epoch, u.share, u.samples, u.epochs) for u in uses] == [
        (10_001, 1_000, 0.75, 300, 0.3),
        (101, 10, 0.25, 100, 10.0),
    ]


def test_sources_that_cannot_be_trained_on_are_refused(tmp_path):
    good = write_stream(tmp_path / "good", np.arange(100))
    floats = write(tmp_path / "floats", [[[0.5] * 50]], "float32")
    short = write_stream(tmp_path / "short", np.arange(8))
    for sources, problem in (
        ([], "no source is given"),
        ([(good, 1), (tmp_path / "missing", 1)], r"missing\.idx: the file does not exist"),
        ([(good, 1), (floats, 1)], r"floats\.bin: holds float32"),
        ([(good, 1), (short, 1)], r"short\.bin: 8 tokens, but one sample of sequence length 8 takes 9"),
        ([(good, 0)], "must be above 0"),
        ([(good, 1), (tmp_path / "x" / ".." / "good", 2)], "is listed twice"),
    ):
        with pytest.raises(UserError, match=problem):
            build_training_samples(sources, 8, seed=0)
    with pytest.raises(IndexError, match="-1"):
        build_training_samples([(good, 1)], 8, seed=0).sample(-1)


def test_sources_of_different_tokenizers_are_refused(tmp_path):
    a, b, c = (write_stream(tmp_path / name, np.arange(100)) for name in "abc")
    make_manifest(a)
    make_manifest(c)
    build_training_samples([(a, 1), (b, 1), (c, 1)], 8, seed=0)  # b says nothing
    make_manifest(c, fingerprint="sha256:bb", file="other.model")
    with pytest.raises(UserError, match=r"made with tokenizer other\.model \(sha256:bb\), but .*a with vocab"):
        build_training_samples([(a, 1), (b, 1), (c, 1)], 8, seed=0)


def test_a_vocabulary_that_is_too_large_is_refused_before_the_run(tmp_path):
    prefix = write_stream(tmp_path / "a", np.arange(100))
    make_manifest(prefix)
    build_training_samples([(prefix, 1)], 8, seed=0, vocab_size=300)
    with pytest.raises(UserError, match="the model only 256"):
        build_training_samples([(prefix, 1)], 8, seed=0, vocab_size=256)
    with pytest.raises(UserError, match="the model only 256"):
        ValidationSet(prefix, 8, vocab_size=256)


def test_validation_predicts_each_token_but_the_first_exactly_once(tmp_path):
    for tokens in (2, 8, 9, 10, 17, 100):
        for length in (1, 2, 8, 200):
            prefix = write_stream(tmp_path / "a", 1 + np.arange(tokens))
            dataset = ValidationSet(prefix, length)
            inputs, targets = dataset.batch(0, dataset.windows)
            assert inputs.shape == targets.shape == (dataset.windows, length)
            assert inputs.dtype == targets.dtype == np.int64
            counted = targets != -100
            assert targets[counted].tolist() == list(range(2, tokens + 1))
            assert (inputs[counted] == targets[counted] - 1).all() and (inputs[~counted] == 0).all()
            assert counted.any(1).all()  # no window of padding only
            assert dataset.targets == counted.sum() == tokens - 1


def test_validation_windows_are_the_same_in_any_batch(tmp_path):
    dataset = ValidationSet(write_stream(tmp_path / "a", np.arange(101)), 7)
    inputs, targets = dataset.batch(0, dataset.windows)
    for first in range(dataset.windows):
        last = min(first + 4, dataset.windows)
        part = dataset.batch(first, last)
        assert np.array_equal(part[0], inputs[first:last]) and np.array_equal(part[1], targets[first:last])
    with pytest.raises(IndexError):
        dataset.batch(3, dataset.windows + 1)


def test_validation_knows_words_and_bytes_from_the_manifest(tmp_path):
    prefix = write_stream(tmp_path / "a", np.arange(100))
    assert (ValidationSet(prefix, 8).words, ValidationSet(prefix, 8).text_bytes) == (None, None)
    make_manifest(prefix, words=70, text_bytes=444)
    assert (ValidationSet(prefix, 8).words, ValidationSet(prefix, 8).text_bytes) == (70, 444)


def test_validation_on_one_token_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to predict"):
        ValidationSet(write(tmp_path / "a", [[[1]]]), 8)
