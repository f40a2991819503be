"""Megatron's order is megatron-core's own, index for index and token for token."""

from __future__ import annotations

import numpy as np
import pytest
from support import small_config, write_config

from megachiar.config import load_config
from megachiar.data.sampling.dataset import TokenSource
from megachiar.data.sampling.megatron_order import MegatronOrder, MegatronStream, blend
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import UserError
from megachiar.topology import LaunchError
from megachiar.training.run_data import open_data

gpt_dataset = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is not installed")


class Tokenizer:
    """What GPTDataset asks of one."""

    eod, pad, vocab_size, unique_identifiers = 0, 64, 64, {"class": "none"}


def write(prefix, seed, documents=30, longest=90):
    """Documents of one or two sequences of very different lengths, some of them empty."""
    rng = np.random.default_rng(seed)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for _ in range(documents):
            lengths = rng.integers(0, longest, rng.integers(1, 3))
            builder.add_sequences(rng.integers(0, 64, lengths.sum()), lengths, [builder.sequences + lengths.size])
    return prefix


def peer_config(blend, sequence_length, seed):
    return gpt_dataset.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[blend, None, None],
        split=None,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        tokenizer=Tokenizer(),
        mid_level_dataset_surplus=0.005,
    )


def peer_samples(blend, sequence_length, seed, samples):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

    builder = BlendedMegatronDatasetBuilder(
        gpt_dataset.GPTDataset, [samples, 0, 0], lambda: True, peer_config(blend, sequence_length, seed)
    )
    return builder.build()[0]


def tokens_of(sample):
    return [*sample["tokens"].tolist(), int(sample["labels"][-1])]


@pytest.mark.parametrize("samples", [1, 17, 40, 83, 90, 400])
@pytest.mark.parametrize("sequence_length", [5, 32])
def test_one_source(tmp_path, samples, sequence_length):
    """Less than an epoch, about one, a last epoch that is shuffled by itself and one that is not."""
    prefix = write(tmp_path / "a", seed=samples)
    peer = peer_samples(([str(prefix)], None), sequence_length, 1234, samples)
    source = TokenSource(prefix)
    order = MegatronOrder(source.dataset.lengths, sequence_length, samples, 1234)
    assert np.array_equal(order.documents, peer.document_index)
    assert np.array_equal(order.shuffle, peer.shuffle_index)
    stream = MegatronStream([source], [1.0], sequence_length, 1234, samples)
    for position in range(samples):
        assert stream.sample(position).tolist() == tokens_of(peer[position])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.2, 0.1), (3.0, 1.0, 1.0, 2.5)])
def test_a_blend(tmp_path, weights):
    pytest.importorskip("numba")
    prefixes = [write(tmp_path / str(number), seed=number) for number in range(len(weights))]
    peer = peer_samples(([str(prefix) for prefix in prefixes], list(weights)), 16, 7, 300)
    sources, numbers = blend(weights, 300)
    assert np.array_equal(sources, peer.dataset_index[:300])
    assert np.array_equal(numbers, peer.dataset_sample_index[:300])
    stream = MegatronStream([TokenSource(prefix) for prefix in prefixes], weights, 16, 7, 300)
    for position, row in enumerate(stream.batch(range(300))):
        assert row.tolist() == tokens_of(peer[position])


def test_places_and_documents_are_those_of_the_tokens(tmp_path):
    source = TokenSource(write(tmp_path / "a", seed=1))
    stream = MegatronStream([source], [1.0], 40, 3, 50)
    for position, place in enumerate(stream.locate(range(50))):
        sample, documents = stream.sample(position), stream.documents(position)
        assert source.dataset.document_of_token(place.token) == documents[0]
        assert source.dataset.tokens[place.token] == sample[0]
        joined = set(np.concatenate([source.dataset.document(number) for number in documents]).tolist())
        assert set(sample.tolist()) <= joined
    (use,) = stream.describe(50)
    assert use.samples == 50 and use.epochs == 50 / use.samples_per_epoch
    with pytest.raises(IndexError, match="position 50"):
        stream.sample(50)


def test_a_run_reads_in_the_order_that_its_config_names(tmp_path):
    prefix = write(tmp_path / "train", seed=5, documents=100)
    config = write_config(tmp_path / "config.yaml", small_config(tmp_path, data={"validation": {}}))
    peer = peer_samples(([str(prefix)], None), 32, 1, 160)
    megatron = open_data(load_config(config, ["data.order=megatron", "training.seed=1"])).training
    assert megatron.sample(3).tolist() == tokens_of(peer[3])
    keyed = open_data(load_config(config, ["training.seed=1"])).training
    assert keyed.sample(3).tolist() != megatron.sample(3).tolist()


def test_a_source_shorter_than_a_sample_is_refused(tmp_path):
    prefix = write(tmp_path / "train", seed=5, documents=1, longest=10)
    with pytest.raises(UserError, match="tokens, but one sample of sequence length 32 takes 33"):
        MegatronStream([TokenSource(prefix)], [1.0], 32, 1, 4)
    config = write_config(tmp_path / "config.yaml", small_config(tmp_path, data={"validation": {}}))
    with pytest.raises(LaunchError, match="one sample"):
        open_data(load_config(config, ["data.order=megatron"]))
