"""Reproduce Megatron's order of training samples, index for index, to continue its runs or compare with them.

    sequences of a source, repeated for as many epochs as the run needs and shuffled    (document index)
      | cut into samples of T + 1 tokens, each beginning with the last token of the one before
      | shuffled                                                                         (shuffle index)
      v
    blend of the sources: each position takes the source that lags furthest behind its weight

Where the epochs do not divide the run evenly, the last one is shuffled by itself, as ``GPTDataset`` does. Unlike the
order of ``order.py``, this one depends on the number of samples of the whole run. It takes memory (12 bytes a sequence
and epoch, 4 to 12 bytes a sample), and time before the first sample. The sample index, which Megatron builds in C++, is
a sum and a binary search here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megachiar.data.sampling.dataset import SampleLocation, SourceUse, TokenSource
from megachiar.data.storage.files import bin_path
from megachiar.errors import UserError

SURPLUS = 0.005  # share of samples that are built beyond need for each source of a blend, mid_level_dataset_surplus
OWN_LAST_EPOCH = 0.80  # a last epoch is shuffled by itself if a smaller share of it is used
MOST_SOURCES = 32767  # Megatron counts them in 16 bits


class MegatronOrder:
    """Order the samples of one source as Megatron does.

    Attributes:
        sequence_length: T.
        documents: the sequence at each index of the shuffled epochs, int32 (epochs * sequences,).
        ends: the tokens up to the end of each of these sequences, int64 (epochs * sequences,).
        shuffle: the sample at each index of the order, (samples,).
        epochs: the passes over the source that the order is made of.

    Args:
        lengths: the tokens of each sequence of the source, int32 (sequences,).
        sequence_length: T.
        samples: the samples that the run takes from this source.
        seed: the seed of the run.
        where: the name of the source in errors.

    Raises:
        UserError: the source is shorter than one sample.
    """

    def __init__(
        self, lengths: NDArray[np.int32], sequence_length: int, samples: int, seed: int, where: object = "dataset"
    ):
        tokens = int(lengths.sum(dtype=np.int64))
        if tokens <= sequence_length:
            raise UserError(
                where,
                f"{tokens:,} tokens, but one sample of sequence length {sequence_length:,} takes "
                f"{sequence_length + 1:,}",
                "use a larger dataset or a shorter data.sequence_length",
            )
        self.sequence_length = sequence_length
        self.epochs = max(1, -(-(samples * sequence_length + 1) // tokens))
        before_last = ((self.epochs - 1) * tokens - 1) // sequence_length
        of_an_epoch = (tokens - 1) // sequence_length
        own_last = self.epochs > 1 and samples - before_last < int(OWN_LAST_EPOCH * of_an_epoch)
        random = np.random.RandomState(seed)
        parts = (self.epochs - 1, 1) if own_last else (self.epochs,)
        self.documents = np.concatenate([_shuffled_epochs(lengths.size, epochs, random) for epochs in parts])
        self.ends = np.cumsum(lengths[self.documents], dtype=np.int64)
        count = (self.epochs * tokens - 1) // sequence_length
        cuts = (0, before_last, count) if own_last else (0, count)
        self.shuffle = np.concatenate([_shuffled_range(a, b, random) for a, b in itertools.pairwise(cuts)])

    def pieces(self, sample: int) -> list[tuple[int, int, int]]:
        """Return sequence, first token in it, and number of tokens of each piece of a sample's T + 1 tokens."""
        begin = int(self.shuffle[sample]) * self.sequence_length
        end = begin + self.sequence_length + 1
        pieces = []
        index = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            until = min(end, int(self.ends[index]))
            first = int(self.ends[index - 1]) if index else 0
            if until > begin:
                pieces.append((int(self.documents[index]), begin - first, until - begin))
            begin, index = until, index + 1
        return pieces

    def epoch(self, sample: int) -> int:
        """Return the pass over the source, in the order of the document index, that a sample begins in."""
        begin = int(self.shuffle[sample]) * self.sequence_length
        return int(np.searchsorted(self.ends, begin, side="right")) * self.epochs // self.documents.size


def _shuffled_epochs(sequences: int, epochs: int, random: np.random.RandomState) -> NDArray[np.int32]:
    """Return the sequences of some epochs, shuffled together."""
    index = np.tile(np.arange(sequences, dtype=np.int32), epochs)
    random.shuffle(index)
    return index


def _shuffled_range(first: int, last: int, random: np.random.RandomState) -> NDArray[Any]:
    """Return the numbers ``first`` to ``last - 1``, shuffled, in the type that Megatron takes for them."""
    index = np.arange(first, last, dtype=np.uint32 if last < np.iinfo(np.uint32).max - 1 else np.int64)
    random.shuffle(index)
    return index


def blend(weights: Sequence[float], samples: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Return the source of each position, int16 (samples,), and the number of its sample, int64 (samples,).

    Raises:
        UserError: numba, which runs the loop at the speed of C, is not installed.
    """
    try:
        import numba
    except ImportError as error:
        raise UserError(
            "data.order", "megatron with several sources needs numba", "pip install 'megachiar[megatron]'"
        ) from error
    if len(weights) > MOST_SOURCES:
        raise UserError("data.train", f"{len(weights):,} sources; Megatron's order has {MOST_SOURCES:,}", "merge some")
    sources, numbers = np.empty(samples, np.int16), np.empty(samples, np.int64)
    # Megatron divides by the sum twice, in its builder and in BlendedDataset; the last bit decides where sources tie.
    numba.njit(_fill_blend)(_normalised(_normalised(weights)), sources, numbers)
    return sources, numbers


def _normalised(weights: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights divided by their sum, float64 (sources,)."""
    weights = np.asarray(weights, np.float64)
    return weights / np.sum(weights)


def _fill_blend(weights: NDArray[np.float64], sources: NDArray[np.int16], numbers: NDArray[np.int64]) -> None:
    """Fill ``sources`` and ``numbers`` as ``blend`` returns them; numba compiles this loop."""
    drawn = np.zeros(weights.size, np.int64)
    for position in range(sources.size):
        so_far = max(float(position), 1.0)
        furthest, most = 0, weights[0] * so_far - drawn[0]
        for source in range(1, weights.size):
            lag = weights[source] * so_far - drawn[source]
            if lag > most:
                furthest, most = source, lag
        sources[position], numbers[position] = furthest, drawn[furthest]
        drawn[furthest] += 1


class MegatronStream:
    """Read a run's samples in Megatron's order; it has the methods of ``dataset.SampleStream``.

    Attributes:
        sequence_length: T.
        samples: the samples of the whole run.
        shares: the share of samples of each source, float64 (sources,).
        orders: the order of each source.

    Args:
        sources: the datasets.
        weights: the weight of each source, relative to the others.
        sequence_length: T.
        seed: the seed of the order, Megatron's ``--seed``.
        samples: the samples of the whole run, steps times global batch size.

    Raises:
        UserError: a source is shorter than one sample.
    """

    def __init__(
        self,
        sources: Sequence[TokenSource],
        weights: Sequence[float],
        sequence_length: int,
        seed: int,
        samples: int,
    ):
        self.sources, self.sequence_length, self.samples = tuple(sources), sequence_length, samples
        self.shares = _normalised(weights)
        single = len(sources) == 1
        self._blend = None if single else blend(weights, samples)
        counts = [samples] if single else [_with_surplus(samples, float(share)) for share in self.shares]
        self.orders = tuple(
            MegatronOrder(source.dataset.lengths, sequence_length, count, seed, bin_path(source.prefix))
            for source, count in zip(sources, counts, strict=True)
        )

    def sample(self, position: int) -> NDArray[np.int64]:
        """Return sample ``position`` of the run, int64 (T + 1,)."""
        return self.batch([position])[0]

    def batch(self, positions: Iterable[int]) -> NDArray[np.int64]:
        """Return the samples of the run at ``positions``, int64 (n, T + 1)."""
        drawn = [self._draw(position) for position in positions]
        batch = np.empty((len(drawn), self.sequence_length + 1), np.int64)
        for row, (number, sample) in zip(batch, drawn, strict=True):
            source, filled = self.sources[number], 0
            for sequence, first, length in self.orders[number].pieces(sample):
                token = int(source.dataset.pointers[sequence]) // source.dataset.dtype.itemsize + first
                source.read(token, row[filled : filled + length])
                filled += length
        return batch

    def locate(self, positions: Iterable[int]) -> list[SampleLocation]:
        """Return where the samples at ``positions`` begin."""
        locations = []
        for number, sample in map(self._draw, positions):
            dataset, order = self.sources[number].dataset, self.orders[number]
            sequence, first, _ = order.pieces(sample)[0]
            token = int(dataset.pointers[sequence]) // dataset.dtype.itemsize + first
            locations.append(SampleLocation(number, order.epoch(sample), token))
        return locations

    def documents(self, position: int) -> list[int]:
        """Return the documents that sample ``position`` is made of, in order."""
        number, sample = self._draw(position)
        starts = self.sources[number].dataset.document_starts
        pieces = self.orders[number].pieces(sample)
        return [int(np.searchsorted(starts, sequence, side="right")) - 1 for sequence, _, _ in pieces]

    def describe(self, samples: int) -> list[SourceUse]:
        """Describe the part of each source in the first ``samples`` samples of the run."""
        drawn = [samples] if self._blend is None else np.bincount(self._blend[0][:samples], minlength=len(self.sources))
        uses = []
        for source, share, count in zip(self.sources, self.shares, drawn, strict=True):
            tokens = source.dataset.tokens.size
            each = (tokens - 1) // self.sequence_length
            uses.append(SourceUse(Path(source.prefix), float(share), tokens, each, int(count), int(count) / each))
        return uses

    def _draw(self, position: int) -> tuple[int, int]:
        """Return the source and the sample of that source at a position of the run."""
        if not 0 <= position < self.samples:
            raise IndexError(f"position {position} of a run of {self.samples:,} samples")
        if self._blend is None:
            return 0, position
        return int(self._blend[0][position]), int(self._blend[1][position])


def _with_surplus(samples: int, share: float) -> int:
    """Return how many samples Megatron builds for a source with this share of the run."""
    return math.ceil(math.ceil(samples * share) * (1 + SURPLUS))
