"""The order of training samples, a pure function of (seed, position): no index is built, stored or shuffled.

    position p of the run
      | Blend: fixed quotas inside blocks of positions, permuted by key
      v
    source i, its k-th sample of the run
      | StreamOrder: epoch = k // n, keyed permutation of the epoch's n samples
      v
    first token of the sample in the source's stream

Memory and start-up do not depend on the size of the sources, and the order is the same for any number of readers and
any place to begin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megachiar.data.permutation import permute, round_keys
from megachiar.errors import UserError

BLOCK_SIZES = (100, 1_000, 10_000, 100_000)  # positions of a blend's block, the smallest that fits
QUOTA_TOLERANCE = 1e-3  # relative error of a source's share that is taken for a smaller block


class Consumed(NamedTuple):
    """What was read of a source: whole epochs, and targets of the next one, in the order of that epoch's samples."""

    epoch: int = 0
    tokens: int = 0


class StreamOrder:
    """Order of one source's samples: an endless series of epochs, each a permutation of the source's n samples.

    The source is one stream of N tokens. Sample j of an epoch is T + 1 tokens, the last of them the first of sample
    j + 1, so that no target is left out between samples and none comes twice:

        tokens    0 .. shift          shift + T        shift + 2T             shift + nT
                  |-----| sample 0 |------| sample 1 |------| ...  sample n - 1 |----|

    n = (N - 1) // T. ``shift`` is 0 in epoch 0 and otherwise one of 0 .. T - 1 by key, so that samples are cut
    elsewhere in each epoch; the last sample of a shifted epoch may run over the end of the stream and goes on at its
    beginning. At most T tokens are no target in an epoch, not the same ones in each.

    Args:
        tokens: N, length of the stream.
        sequence_length: T.
        key: what names this order: the seed of the run and the number of the source.
        where: named in errors.

    Raises:
        UserError: the stream is shorter than one sample.
    """

    def __init__(self, tokens: int, sequence_length: int, key: tuple[int, ...], where: object = "dataset"):
        self.samples_per_epoch = (tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise UserError(
                where,
                f"{tokens:,} tokens, but one sample of sequence length {sequence_length:,} takes "
                f"{sequence_length + 1:,}",
                "use a larger dataset or a shorter data.sequence_length",
            )
        self.tokens, self.sequence_length, self._key = tokens, sequence_length, key

    def first_after(self, consumed: Consumed) -> int:
        """The first of the source's samples that begins after what was read of it, with whatever sequence length."""
        in_epoch = min(-(-consumed.tokens // self.sequence_length), self.samples_per_epoch)
        return consumed.epoch * self.samples_per_epoch + in_epoch

    def consumed(self, samples: int) -> Consumed:
        """What the source's first ``samples`` samples of the run are in epochs and tokens."""
        epoch, in_epoch = divmod(samples, self.samples_per_epoch)
        return Consumed(epoch, in_epoch * self.sequence_length)

    def epochs(self, samples: np.ndarray) -> np.ndarray:
        """Epoch that each of this source's samples of the run (int64) belongs to."""
        return np.asarray(samples, dtype=np.int64) // self.samples_per_epoch

    def shift(self, epoch: int) -> int:
        """First token of the first sample of ``epoch``, in 0 .. T - 1."""
        return int(round_keys("shift", *self._key, epoch)[0]) % self.sequence_length if epoch else 0

    def starts(self, samples: np.ndarray) -> np.ndarray:
        """First token of each of this source's samples of the run.

        Args:
            samples: int64 (n,), 0 is the first sample of epoch 0.

        Returns:
            int64 (n,), each below N; the T + 1 tokens from there on go on at the stream's beginning after its end.
        """
        samples = np.asarray(samples, dtype=np.int64)
        epochs = self.epochs(samples)
        starts = np.empty_like(samples)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            place = permute(
                samples[chosen] - epoch * self.samples_per_epoch,
                self.samples_per_epoch,
                round_keys("epoch", *self._key, int(epoch)),
            )
            starts[chosen] = place * self.sequence_length + self.shift(int(epoch))
        return starts


class Draws(NamedTuple):
    """Where positions of a run draw from.

    Attributes:
        sources: number of the source, int64 (n,).
        samples: which sample of that source it is, counted over the run from 0, int64 (n,).
    """

    sources: np.ndarray
    samples: np.ndarray


class Blend:
    """Which source each position of the run draws from: exact quotas in every block of positions, permuted by key.

    Positions are cut into blocks of B. Source i has ``quotas[i]`` positions in every block, sum B, at places that
    differ from block to block; so its share is exact after every block. Each source's samples come strictly in turn:
    after any position the samples used up are the first ``counts`` of each, without a gap, which is what makes an
    epoch an epoch and lets another blend go on from there.

    One block of at most ``BLOCK_SIZES[-1]`` positions is kept in memory, whichever was asked for last.

    Args:
        weights: of the sources, positive, any sum.
        seed: of the run.
        first: position of the run that the blend begins at; each source's draws are counted from there.

    Raises:
        UserError: a weight is not positive and finite, or too small beside the others.
    """

    def __init__(self, weights: Sequence[float], seed: int, first: int = 0):
        shares = np.asarray(weights, dtype=np.float64)
        if shares.size == 0 or not np.isfinite(shares).all() or (shares <= 0).any():
            raise UserError(
                "data.train", f"weights {list(weights)}, each must be above 0 and finite", "mend the weight"
            )
        self.shares = shares / shares.sum()
        self.quotas = _quotas(self.shares)
        self.block = int(self.quotas.sum())
        self.first = first
        self._key = (seed, first) if first else (seed,)
        self._last_block = (0, self._draws_of_block(0))

    def draws(self, positions: np.ndarray) -> Draws:
        """Source and sample of the source for each position of the run, int64 (n,), none before ``first``."""
        positions = np.asarray(positions, dtype=np.int64) - self.first
        blocks = positions // self.block
        sources, samples = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            chosen = blocks == block
            slots = positions[chosen] - block * self.block
            drawn = self._block(int(block))
            sources[chosen], samples[chosen] = drawn.sources[slots], drawn.samples[slots]
        return Draws(sources, samples)

    def counts(self, positions: int) -> np.ndarray:
        """Samples drawn from each source by the positions from ``first`` to ``positions``, int64 (sources,)."""
        whole, rest = divmod(positions - self.first, self.block)
        begun = self._block(whole).sources[:rest]
        return whole * self.quotas + np.bincount(begun, minlength=self.quotas.size)

    def _block(self, number: int) -> Draws:
        known, drawn = self._last_block  # one read and one write of one name: threads may share a blend
        if known != number:
            drawn = self._draws_of_block(number)
            self._last_block = (number, drawn)
        return drawn

    def _draws_of_block(self, number: int) -> Draws:
        """The draws of all positions of a block, in order."""
        ends = np.cumsum(self.quotas)
        slots = permute(np.arange(self.block), self.block, round_keys("blend", *self._key, number))
        sources = np.searchsorted(ends, slots, side="right")
        by_source = np.argsort(sources, kind="stable")
        turn = np.empty_like(sources)  # of a draw among its source's draws in this block
        turn[by_source] = np.arange(self.block) - (ends - self.quotas)[sources[by_source]]
        return Draws(sources, number * self.quotas[sources] + turn)


class OrderedSource(NamedTuple):
    """A source as an order knows it.

    Attributes:
        tokens: length of its stream.
        weight: of its samples, relative to the others'.
        number: what names its order beside the seed; another one for each source of the run.
        consumed: what was read of it before.
        where: named in errors.
    """

    tokens: int
    weight: float
    number: int
    consumed: Consumed = Consumed()
    where: object = "dataset"


class RunOrder:
    """Where the samples of a run lie, from ``first`` on: a blend of ordered sources.

    Attributes:
        blend, orders: what it is made of.
        first: the first position that it knows.

    Args:
        sources: at least one.
        sequence_length: T.
        seed: of the run.
        first: position of the run that it begins at.

    Raises:
        UserError: a source is shorter than one sample, or a weight cannot be kept.
    """

    def __init__(self, sources: Sequence[OrderedSource], sequence_length: int, seed: int, first: int = 0):
        self.sequence_length, self.first = sequence_length, first
        self.blend = Blend([source.weight for source in sources], seed, first)
        self.orders = tuple(
            StreamOrder(source.tokens, sequence_length, (seed, source.number), source.where) for source in sources
        )
        self._begin = [order.first_after(s.consumed) for order, s in zip(self.orders, sources, strict=True)]

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Source, epoch and first token of the sample at each position, all int64 (n,)."""
        draws = self.blend.draws(positions)
        epochs, tokens = np.empty_like(draws.samples), np.empty_like(draws.samples)
        for number in np.unique(draws.sources):
            chosen, order = draws.sources == number, self.orders[number]
            samples = draws.samples[chosen] + self._begin[number]
            epochs[chosen], tokens[chosen] = order.epochs(samples), order.starts(samples)
        return draws.sources, epochs, tokens

    def consumed(self, position: int) -> list[Consumed]:
        """What was read of each source before ``position``, at least ``first``, in the whole run."""
        counts = self.blend.counts(position).tolist()
        return [
            order.consumed(begin + count) for order, begin, count in zip(self.orders, self._begin, counts, strict=True)
        ]


def _quotas(shares: np.ndarray) -> np.ndarray:
    """Whole positions of each source, int64 (sources,), in the smallest block that keeps the shares."""
    for block in BLOCK_SIZES:
        quotas = _apportion(shares, block)
        if (np.abs(quotas / block / shares - 1) <= QUOTA_TOLERANCE).all():
            return quotas
    if (quotas == 0).any():
        raise UserError(
            "data.train",
            f"a weight is {shares.min():.3g} of the sum, less than one sample in {BLOCK_SIZES[-1]:,}",
            "leave that source out or raise its weight",
        )
    return quotas


def _apportion(shares: np.ndarray, block: int) -> np.ndarray:
    """Split ``block`` by the largest remainders; equal remainders go to the earlier source."""
    exact = shares * block
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    remainders = exact - quotas
    missing = block - int(quotas.sum())
    quotas[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return quotas
