"""Compute the order of training samples as a pure function of (seed, position); no index is built or stored.

    position p of the run
      | Blend: fixed quotas inside blocks of positions, permuted by key
      v
    source i, its k-th sample of the run
      | StreamOrder: epoch = k // n, keyed permutation of the epoch's n samples
      v
    first token of the sample in the source's stream

Memory and start-up time do not depend on the size of the sources. The order is the same for any number of readers, and
wherever a run begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megachiar.data.permutation import permute, round_keys
from megachiar.data.sampling.left_out import IntArray, LeftOut
from megachiar.errors import UserError

BLOCK_SIZES = (100, 1_000, 10_000, 100_000)  # positions of a blend's block; the smallest that fits is taken
QUOTA_TOLERANCE = 1e-3  # largest relative error of a source's share that a block size may cause


class Consumed(NamedTuple):
    """Count how far a source was read: whole epochs, and targets of the next one, in the order of its samples."""

    epoch: int = 0
    tokens: int = 0


class StreamOrder:
    """Order one source's samples: an endless series of epochs, each a permutation of the source's n samples.

    The source is one stream of N tokens. Sample j of an epoch is T + 1 tokens, and its last token is the first one of
    sample j + 1. So no target between samples is left out, and none is read twice:

        tokens    0 .. shift          shift + T        shift + 2T             shift + nT
                  |-----| sample 0 |------| sample 1 |------| ...  sample n - 1 |----|

    n = (N - 1) // T. ``shift`` is 0 in epoch 0; in later epochs a key draws it from 0 .. T - 1, so that samples are cut
    at other tokens in each epoch. The last sample of a shifted epoch may run over the end of the stream; it continues
    at the beginning. At most T tokens are no target in an epoch, and they are not the same in each.

    Attributes:
        samples_per_epoch: n.
        tokens: N.
        sequence_length: T.

    Args:
        tokens: N, the length of the stream.
        sequence_length: T.
        key: the key of the permutations: the seed of the run and the number of the source.
        where: the name of the source in errors.

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
        """Return the first sample that begins after the tokens that are consumed, with any sequence length."""
        in_epoch = min(-(-consumed.tokens // self.sequence_length), self.samples_per_epoch)
        return consumed.epoch * self.samples_per_epoch + in_epoch

    def consumed(self, samples: int) -> Consumed:
        """Return the source's first ``samples`` samples of the run in epochs and tokens."""
        epoch, in_epoch = divmod(samples, self.samples_per_epoch)
        return Consumed(epoch, in_epoch * self.sequence_length)

    def epochs(self, samples: IntArray) -> IntArray:
        """Return the epoch that each of this source's samples of the run belongs to, int64 of the same shape."""
        return np.asarray(samples, dtype=np.int64) // self.samples_per_epoch

    def shift(self, epoch: int) -> int:
        """Return the first token of the first sample of ``epoch``, in 0 .. T - 1."""
        return int(round_keys("shift", *self._key, epoch)[0]) % self.sequence_length if epoch else 0

    def starts(self, samples: IntArray) -> IntArray:
        """Return the first token of each of this source's samples of the run.

        Args:
            samples: int64 (n,); 0 is the first sample of epoch 0.

        Returns:
            int64 (n,), each below N. After the end of the stream a sample continues at its beginning.
        """
        samples = np.asarray(samples, dtype=np.int64)
        epochs = self.epochs(samples)
        starts = np.empty_like(samples)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            number = permute(
                samples[of_epoch] - epoch * self.samples_per_epoch,
                self.samples_per_epoch,
                round_keys("epoch", *self._key, int(epoch)),
            )
            starts[of_epoch] = number * self.sequence_length + self.shift(int(epoch))
        return starts


class Draws(NamedTuple):
    """Hold the source and the sample that each position of a run reads.

    Attributes:
        sources: the number of the source, int64 (n,).
        samples: the number of the sample among that source's samples of the run, from 0, int64 (n,).
    """

    sources: IntArray
    samples: IntArray


class Blend:
    """Decide which source each position reads: every block of positions has exact quotas, in an order permuted by key.

    Positions are cut into blocks of B. Source i has ``quotas[i]`` positions in every block, at indices that differ from
    block to block; the quotas sum to B. So each share is exact after every block. Each source's samples are read
    strictly in order: after any position, the first ``counts`` samples of each source were read, without a gap. That
    makes an epoch an epoch, and lets another blend continue from there.

    One block of at most ``BLOCK_SIZES[-1]`` positions is kept in memory, the one that was used last.

    Attributes:
        shares: the share of each source, float64 (sources,), sum 1.
        quotas: the positions of each source in a block, int64 (sources,).
        block: B, the positions of a block.
        first: the position of the run that the blend begins at.

    Args:
        weights: the weights of the sources, positive, with any sum.
        seed: the seed of the run.
        first: the position of the run that the blend begins at; each source's samples are counted from there.

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

    def draws(self, positions: IntArray) -> Draws:
        """Return source and sample for each position of the run, int64 (n,), none of them before ``first``."""
        positions = np.asarray(positions, dtype=np.int64) - self.first
        blocks = positions // self.block
        sources, samples = np.empty_like(positions), np.empty_like(positions)
        for block in np.unique(blocks):
            of_block = blocks == block
            slots = positions[of_block] - block * self.block
            drawn = self._block(int(block))
            sources[of_block], samples[of_block] = drawn.sources[slots], drawn.samples[slots]
        return Draws(sources, samples)

    def counts(self, positions: int) -> IntArray:
        """Return the samples of each source at the positions from ``first`` to ``positions - 1``, int64 (sources,)."""
        whole, rest = divmod(positions - self.first, self.block)
        begun = self._block(whole).sources[:rest]
        return whole * self.quotas + np.bincount(begun, minlength=self.quotas.size)

    def positions(self, source: int, samples: IntArray) -> IntArray:
        """Return the position of the run that draws each of a source's samples, int64 (n,); ``draws`` backwards."""
        blocks, ranks = np.divmod(samples, self.quotas[source])
        positions = np.empty_like(blocks)
        for block in np.unique(blocks):
            of_block = blocks == block
            slots = np.flatnonzero(self._block(int(block)).sources == source)
            positions[of_block] = self.first + block * self.block + slots[ranks[of_block]]
        return positions

    def _block(self, number: int) -> Draws:
        """Return the draws of a block, from memory if it was the last one used."""
        known, drawn = self._last_block  # one read and one write of one name: threads may share a blend
        if known != number:
            drawn = self._draws_of_block(number)
            self._last_block = (number, drawn)
        return drawn

    def _draws_of_block(self, number: int) -> Draws:
        """Compute the draws of all positions of a block, in order."""
        ends = np.cumsum(self.quotas)
        slots = permute(np.arange(self.block), self.block, round_keys("blend", *self._key, number))
        sources = np.searchsorted(ends, slots, side="right")
        by_source = np.argsort(sources, kind="stable")
        rank = np.empty_like(sources)  # of a draw among its source's draws in this block
        rank[by_source] = np.arange(self.block) - (ends - self.quotas)[sources[by_source]]
        return Draws(sources, number * self.quotas[sources] + rank)


class OrderedSource(NamedTuple):
    """Describe a source to an order.

    Attributes:
        tokens: the length of its stream.
        weight: its weight, relative to the other sources.
        number: its number in the run, unique; with the seed it is the key of the source's order.
        consumed: how far it was read before.
        where: its name in errors.
    """

    tokens: int
    weight: float
    number: int
    consumed: Consumed = Consumed()
    where: object = "dataset"


class RunOrder:
    """Say where the samples of a run are stored, from ``first`` on: a blend of ordered sources.

    Attributes:
        sequence_length: T.
        blend: which source each position reads.
        orders: the order of each source's samples.
        first: the first position of the order.

    Args:
        sources: the sources, at least one.
        sequence_length: T.
        seed: the seed of the run.
        first: the position of the run that the order begins at; its first place has the same number.
        left_out: first place and end of each range of the order that the run leaves out, ascending and apart.

    Raises:
        UserError: a source is shorter than one sample, or a weight cannot be kept.
    """

    def __init__(
        self,
        sources: Sequence[OrderedSource],
        sequence_length: int,
        seed: int,
        first: int = 0,
        left_out: Sequence[tuple[int, int]] = (),
    ):
        self.sequence_length, self.first = sequence_length, first
        self._left_out = LeftOut(left_out)
        self.blend = Blend([source.weight for source in sources], seed, first)
        self.orders = tuple(
            StreamOrder(source.tokens, sequence_length, (seed, source.number), source.where) for source in sources
        )
        self._begin = [order.first_after(s.consumed) for order, s in zip(self.orders, sources, strict=True)]

    def locate(self, positions: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Return source, epoch and first token of the sample at each position, all int64 (n,)."""
        draws = self.blend.draws(self._left_out.places(np.asarray(positions, dtype=np.int64)))
        epochs, tokens = np.empty_like(draws.samples), np.empty_like(draws.samples)
        for number in np.unique(draws.sources):
            of_source, order = draws.sources == number, self.orders[number]
            samples = draws.samples[of_source] + self._begin[number]
            epochs[of_source], tokens[of_source] = order.epochs(samples), order.starts(samples)
        return draws.sources, epochs, tokens

    def counts(self, position: int) -> IntArray:
        """Return the samples of each source before ``position`` in this order, those left out too, int64 (sources,)."""
        return self.blend.counts(self._left_out.place(position))

    def left_out_samples(self, position: int) -> list[IntArray]:
        """Return the samples of each source that are left out at places from ``position`` on.

        They are given by their numbers among the source's samples of the run, int64 (n,).
        """
        draws = self.blend.draws(self._left_out.places_from(position))
        return [draws.samples[draws.sources == index] + begin for index, begin in enumerate(self._begin)]

    def places(self, source: int, samples: IntArray) -> IntArray:
        """Return the place of each of a source's samples, int64 (n,), none of them before the order's first."""
        return self.blend.positions(source, samples - self._begin[source])

    def consumed(self, position: int) -> list[Consumed]:
        """Return what the whole run read or left out of each source before ``position``, at least ``first``."""
        counts = self.counts(position).tolist()
        return [
            order.consumed(begin + count) for order, begin, count in zip(self.orders, self._begin, counts, strict=True)
        ]


def _quotas(shares: NDArray[np.float64]) -> IntArray:
    """Return the positions of each source, int64 (sources,), in the smallest block that keeps the shares."""
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


def _apportion(shares: NDArray[np.float64], block: int) -> IntArray:
    """Split ``block`` positions by the largest remainders, int64 (sources,); of equal ones the earlier source wins."""
    exact = shares * block
    quotas = np.floor(exact + 1e-9).astype(np.int64)
    remainders = exact - quotas
    missing = block - int(quotas.sum())
    quotas[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return quotas
