"""Megatron's order of training samples, index for index, for runs that are to go on or be compared with its own.

    sequences of a source, repeated for as many epochs as the run needs and shuffled    (document index)
      | cut into samples of T + 1 tokens, each beginning with the last token of the one before
      | shuffled                                                                         (shuffle index)
      v
    blend of the sources: at each position the source that lags furthest behind its weight

Where the epochs do not divide the run evenly the last one is shuffled by itself, as ``GPTDataset`` does. Unlike ours,
this order depends on the number of samples of the whole run, takes memory (12 bytes a sequence and epoch, 4 to 12 a
sample), and time before the first sample. The sample index, which Megatron builds in C++, is a sum and a binary search.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megachiar.data.sampling.dataset import SampleLocation, SourceUse, TokenSource
from megachiar.data.storage.files import bin_path
from megachiar.errors import UserError

SURPLUS = 0.005  # of samples built for each source of a blend, Megatron's mid_level_dataset_surplus
OWN_LAST_EPOCH = 0.80  # a last epoch that is used less than this is shuffled by itself
MOST_SOURCES = 32767  # Megatron counts them in 16 bits


class MegatronOrder:
    """Samples of one source.

    Attributes:
        documents: sequence at each place of the shuffled epochs, int32 (epochs * sequences,).
        ends: tokens up to the end of each of them, int64.
        shuffle: which sample stands at each place of the order, (samples,).
        epochs: passes over the source that the order is made of.

    Args:
        lengths: tokens of each sequence of the source, int32 (sequences,).
        sequence_length: T.
        samples: that the run asks of this source.
        seed: of the run.
        where: named in errors.

    Raises:
        UserError: the source is shorter than one sample.
    """

    def __init__(self, lengths: np.ndarray, sequence_length: int, samples: int, seed: int, where: object = "dataset"):
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
        """(sequence, first token in it, number of tokens) of each piece of a sample's T + 1 tokens."""
        begin = int(self.shuffle[sample]) * self.sequence_length
        end = begin + self.sequence_length + 1
        pieces = []
        place = int(np.searchsorted(self.ends, begin, side="right"))
        while begin < end:
            until = min(end, int(self.ends[place]))
            first = int(self.ends[place - 1]) if place else 0
            if until > begin:
                pieces.append((int(self.documents[place]), begin - first, until - begin))
            begin, place = until, place + 1
        return pieces

    def epoch(self, sample: int) -> int:
        """The pass over the source, as they stand in the document index, that a sample begins in."""
        begin = int(self.shuffle[sample]) * self.sequence_length
        return int(np.searchsorted(self.ends, begin, side="right")) * self.epochs // self.documents.size


def _shuffled_epochs(sequences: int, epochs: int, random: np.random.RandomState) -> np.ndarray:
    index = np.tile(np.arange(sequences, dtype=np.int32), epochs)
    random.shuffle(index)
    return index


def _shuffled_range(first: int, last: int, random: np.random.RandomState) -> np.ndarray:
    index = np.arange(first, last, dtype=np.uint32 if last < np.iinfo(np.uint32).max - 1 else np.int64)
    random.shuffle(index)
    return index


def blend(weights: Sequence[float], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Source of each position, int16 (samples,), and which of that source's samples it is, int64 (samples,).

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


def _normalised(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    return weights / np.sum(weights)


def _fill_blend(weights: np.ndarray, sources: np.ndarray, numbers: np.ndarray) -> None:
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
    """A run's samples in Megatron's order; used as ``dataset.SampleStream`` is.

    Args:
        sources: to read from.
        weights: share of samples of each source, relative to the others.
        sequence_length: T.
        seed: of the order, Megatron's ``--seed``.
        samples: of the whole run: steps times global batch.

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
        wanted = [samples] if single else [_with_surplus(samples, float(share)) for share in self.shares]
        self.orders = tuple(
            MegatronOrder(source.dataset.lengths, sequence_length, count, seed, bin_path(source.prefix))
            for source, count in zip(sources, wanted, strict=True)
        )

    def sample(self, position: int) -> np.ndarray:
        """Sample ``position`` of the run, int64 (T + 1,)."""
        return self.batch([position])[0]

    def batch(self, positions: Iterable[int]) -> np.ndarray:
        """Samples of the run at ``positions``, int64 (n, T + 1)."""
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
        """Where the samples at ``positions`` begin."""
        locations = []
        for number, sample in map(self._draw, positions):
            dataset, order = self.sources[number].dataset, self.orders[number]
            sequence, first, _ = order.pieces(sample)[0]
            token = int(dataset.pointers[sequence]) // dataset.dtype.itemsize + first
            locations.append(SampleLocation(number, order.epoch(sample), token))
        return locations

    def documents(self, position: int) -> list[int]:
        """The documents that sample ``position`` is made of, in order."""
        number, sample = self._draw(position)
        starts = self.sources[number].dataset.document_starts
        pieces = self.orders[number].pieces(sample)
        return [int(np.searchsorted(starts, sequence, side="right")) - 1 for sequence, _, _ in pieces]

    def describe(self, samples: int) -> list[SourceUse]:
        """What the first ``samples`` samples of the run take from each source."""
        drawn = [samples] if self._blend is None else np.bincount(self._blend[0][:samples], minlength=len(self.sources))
        uses = []
        for source, share, count in zip(self.sources, self.shares, drawn, strict=True):
            tokens = source.dataset.tokens.size
            each = (tokens - 1) // self.sequence_length
            uses.append(SourceUse(Path(source.prefix), float(share), tokens, each, int(count), int(count) / each))
        return uses

    def _draw(self, position: int) -> tuple[int, int]:
        """(source, sample of that source) at a position of the run."""
        if not 0 <= position < self.samples:
            raise IndexError(f"position {position} of a run of {self.samples:,} samples")
        if self._blend is None:
            return 0, position
        return int(self._blend[0][position]), int(self._blend[1][position])


def _with_surplus(samples: int, share: float) -> int:
    return math.ceil(math.ceil(samples * share) * (1 + SURPLUS))
