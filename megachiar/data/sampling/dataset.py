"""Cut training samples and validation windows out of indexed datasets.

Shapes: n samples, T = sequence length. A training sample is T + 1 tokens: inputs are its first T, targets its last T.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megachiar.data.sampling.order import OrderedSource, RunOrder
from megachiar.data.storage.files import bin_path, idx_path
from megachiar.data.storage.manifest import (
    check_manifest,
    check_same_tokenizer,
    check_vocabulary,
    read_manifest,
)
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.sampled_digest import sampled_digest
from megachiar.errors import UserError
from megachiar.kernels.ignored_target import IGNORED_TARGET

LOCATED_TOGETHER = 1024  # positions of a run that are located at once
READ_TOKENS = 2**20  # tokens that are read at once


class TokenSource:
    """Open a dataset to train on, and check that it is whole, holds integers and fits the model's vocabulary.

    Attributes:
        prefix: the path of the dataset.
        dataset: its memory map.
        tokens: those of it that are read, from the first on.
        manifest: the manifest beside it; None for a dataset that another program made.
        vocab_size: the rows of the model's embedding; None leaves ids unchecked.

    Args:
        prefix: the path of the dataset without ``.bin``.
        vocab_size: the rows of the model's embedding; None leaves ids unchecked.
        limit: how many of its tokens are read, from the first on; None reads all.
        random_access: whether it will be read in random order, see ``IndexedDataset``.

    Raises:
        UserError: the dataset is damaged, holds floats, does not fit its manifest, or its tokenizer has more ids than
            the model.
    """

    def __init__(
        self,
        prefix: Path | str,
        vocab_size: int | None = None,
        *,
        limit: int | None = None,
        random_access: bool = False,
    ):
        self.prefix = Path(prefix)
        self.dataset = IndexedDataset(prefix, random_access=random_access)
        self.tokens = self.dataset.tokens[:limit]
        self.vocab_size = vocab_size
        if self.dataset.dtype.kind not in "iu":
            raise UserError(
                bin_path(prefix), f"holds {self.dataset.dtype.name}, but tokens are whole numbers", "preprocess again"
            )
        self.manifest = read_manifest(prefix)
        if self.manifest is not None:
            check_manifest(prefix, self.manifest, self.dataset)
            if vocab_size is not None:
                check_vocabulary(prefix, self.manifest, vocab_size)

    @property
    def units(self) -> int:
        """What an order of its samples counts: the tokens that are read."""
        return self.tokens.size

    @property
    def whole(self) -> int:
        """The same of the whole dataset."""
        return self.dataset.tokens.size

    def sampled_digest(self) -> str:
        """Return digests of a few blocks of ``.bin`` and ``.idx``: datasets that differ in them are not the same."""
        return " ".join(sampled_digest(path(self.prefix)) for path in (bin_path, idx_path))

    def read(self, start: int, out: NDArray[Any]) -> None:
        """Fill ``out``, int64 (length,), with the tokens from ``start`` on; after the last token comes the first.

        Raises:
            UserError: ``check_ids`` raises it.
        """
        self.copy(start, out)
        self.check_ids(start, out)

    def copy(self, start: int, out: NDArray[Any]) -> None:
        """Fill ``out`` as ``read`` does, without checking the ids."""
        tokens = self.tokens
        until_end = min(out.size, tokens.size - start)
        out[:until_end] = tokens[start : start + until_end]
        if until_end < out.size:
            out[until_end:] = tokens[: out.size - until_end]

    def check_ids(self, start: int, ids: NDArray[Any]) -> None:
        """Check the ids that were read from ``start`` on.

        Raises:
            UserError: an id is negative or not below the model's vocabulary. Only a dataset without a manifest, or one
                that was damaged since it was written, has such an id here.
        """
        if self.vocab_size is None or (int(ids.min()) >= 0 and int(ids.max()) < self.vocab_size):
            return
        offset = int(np.argmax((ids < 0) | (ids >= self.vocab_size)))
        token = (start + offset) % self.tokens.size
        raise UserError(
            bin_path(self.prefix),
            f"token {token:,} (document {self.dataset.document_of_token(token):,}) is id {ids[offset]}, "
            f"but the model's vocabulary is 0 to {self.vocab_size - 1:,}",
            "train with the vocabulary the dataset was made with, or check the file with `megachiar inspect`",
        )


def token_blocks(source: TokenSource, tokens: int) -> Iterator[NDArray[Any]]:
    """Yield blocks of at most ``READ_TOKENS`` tokens, spread evenly over the text, int64.

    Together they hold ``tokens`` tokens, or all if there are fewer.
    """
    whole = source.tokens.size
    total = min(tokens, whole)
    blocks = -(-total // READ_TOKENS)
    for number in range(blocks):
        begin, end = number * total // blocks, (number + 1) * total // blocks
        block = np.empty(end - begin, np.int64)
        source.read(begin + number * (whole - total) // max(1, blocks - 1), block)
        yield block


class SourceUse(NamedTuple):
    """Describe the part of one source in a run.

    Attributes:
        prefix: the path of the dataset.
        share: its share of all samples, in (0, 1].
        tokens: the tokens of the dataset.
        samples_per_epoch: the samples that one pass over it gives.
        samples: the samples that the current order takes from it.
        epochs: the passes over it in the whole run, a fraction included.
    """

    prefix: Path
    share: float
    tokens: int
    samples_per_epoch: int
    samples: int
    epochs: float


class SampleLocation(NamedTuple):
    """Say where a sample of a run is stored.

    Attributes:
        source: the number of its source, from 0.
        epoch: the pass over the source, from 0.
        token: the first token of the sample in the source.
    """

    source: int
    epoch: int
    token: int


class SampleStream:
    """Read a run's endless series of training samples: sample k is a pure function of the sources, the order and k.

    Attributes:
        sequence_length: T.

    Args:
        sources: the datasets, as ``order`` numbers them.
        order: the order of the samples, which says where each one is stored.
    """

    def __init__(self, sources: Sequence[TokenSource], order: RunOrder):
        self.sources, self.order, self.sequence_length = tuple(sources), order, order.sequence_length
        self._last_block: tuple[int, list[SampleLocation]] = (-1, [])

    def sample(self, position: int) -> NDArray[Any]:
        """Return sample ``position`` of the run, int64 (T + 1,)."""
        return self.batch([position])[0]

    def batch(self, positions: Iterable[int]) -> NDArray[Any]:
        """Return the samples of the run at ``positions`` (a range, a list, an array), int64 (n, T + 1)."""
        locations = self.locate(positions)
        batch = np.empty((len(locations), self.sequence_length + 1), np.int64)
        for location in locations:  # all reads of the batch are under way before the first is waited for
            self.sources[location.source].dataset.prefetch_hint(location.token, self.sequence_length + 1)
        for row, location in zip(batch, locations, strict=True):
            self.sources[location.source].copy(location.token, row)
        if batch.size and not self._are_known_ids(batch):
            for row, location in zip(batch, locations, strict=True):
                self.sources[location.source].check_ids(location.token, row)
        return batch

    def locate(self, positions: Iterable[int]) -> list[SampleLocation]:
        """Return where the samples at ``positions`` are stored, without reading them."""
        locations = []
        for position in positions:
            if position < self.order.first:
                raise IndexError(f"position {position} of a run; positions begin at {self.order.first}")
            block, row = divmod(int(position) - self.order.first, LOCATED_TOGETHER)
            locations.append(self._block(block)[row])
        return locations

    def _are_known_ids(self, batch: NDArray[Any]) -> bool:
        """Return whether every id is below the model's vocabulary size, as far as that is known."""
        limits = [source.vocab_size for source in self.sources if source.vocab_size is not None]
        return not limits or (int(batch.min()) >= 0 and int(batch.max()) < min(limits))

    def _block(self, number: int) -> list[SampleLocation]:
        """Return the locations of ``LOCATED_TOGETHER`` positions, as many cost little more than one."""
        known, locations = self._last_block  # one read and one write of one name: threads may share a stream
        if known != number:
            first = self.order.first + number * LOCATED_TOGETHER
            columns = self.order.locate(np.arange(first, first + LOCATED_TOGETHER))
            locations = [SampleLocation(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
            self._last_block = (number, locations)
        return locations

    def documents(self, position: int) -> list[int]:
        """Return the documents that sample ``position`` is made of, in order."""
        (location,) = self.locate([position])
        dataset, size = self.sources[location.source].dataset, self.sources[location.source].tokens.size
        first = dataset.document_of_token(location.token)
        last = dataset.document_of_token((location.token + self.sequence_length) % size)
        end = dataset.document_of_token(size - 1) + 1
        return [*range(first, last + 1)] if first <= last else [*range(first, end), *range(last + 1)]

    def describe(self, samples: int) -> list[SourceUse]:
        """Describe the part of each source in the samples of the run up to ``samples``."""
        consumed = self.order.consumed(samples)
        return [
            SourceUse(
                prefix=source.prefix,
                share=float(share),
                tokens=order.tokens,
                samples_per_epoch=order.samples_per_epoch,
                samples=count,
                epochs=used.epoch + used.tokens / (order.samples_per_epoch * self.sequence_length),
            )
            for source, order, share, count, used in zip(
                self.sources,
                self.order.orders,
                self.order.blend.shares,
                self.order.counts(samples).tolist(),
                consumed,
                strict=True,
            )
        ]


def build_training_samples(
    sources: Sequence[tuple[Path | str, float]], sequence_length: int, seed: int, *, vocab_size: int | None = None
) -> SampleStream:
    """Open and check every source, and define the order of a run's samples.

    Args:
        sources: the prefix and the weight of each dataset.
        sequence_length: T.
        seed: the seed of the order.
        vocab_size: the rows of the model's embedding; None leaves ids unchecked.

    Raises:
        UserError: ``open_sources`` raises it, a source is too short, or a weight is not above 0.
    """
    opened = open_sources([prefix for prefix, _ in sources], vocab_size)
    ordered = [
        OrderedSource(source.tokens.size, weight, number, where=bin_path(source.prefix))
        for number, (source, (_, weight)) in enumerate(zip(opened, sources, strict=True))
    ]
    return SampleStream(opened, RunOrder(ordered, sequence_length, seed))


def open_sources(
    prefixes: Sequence[Path | str], vocab_size: int | None = None, fractions: Sequence[float] | None = None
) -> list[TokenSource]:
    """Open and check every source of a run.

    Args:
        prefixes: the paths of the datasets without ``.bin``.
        vocab_size: the rows of the model's embedding; None leaves ids unchecked.
        fractions: the share of its tokens that is read of each, see ``tokens_read``; None reads all of all.

    Raises:
        UserError: there is no source, or one is damaged, listed twice, made with another tokenizer than the first, or
            has too large a vocabulary.
    """
    if not prefixes:
        raise UserError("data.train", "no source is given", "name at least one dataset")
    refuse_duplicates(prefixes)
    shares = fractions or [1.0] * len(prefixes)
    opened = [
        TokenSource(prefix, vocab_size, limit=tokens_read(prefix, share), random_access=True)
        for prefix, share in zip(prefixes, shares, strict=True)
    ]
    check_same_tokenizer([(source.prefix, source.manifest) for source in opened])
    return opened


def tokens_read(prefix: Path | str, fraction: float) -> int | None:
    """Return how many tokens of a dataset are read, rounded up; None for all.

    Args:
        prefix: the path of the dataset.
        fraction: of its tokens, from the first on; it counts as its decimal notation.
    """
    return None if fraction == 1 else part_of(IndexedDataset(prefix).tokens.size, fraction)


def part_of(whole: int, fraction: float) -> int:
    """Return a fraction of a whole number, rounded up; the fraction counts as its decimal notation."""
    return math.ceil(Fraction(repr(fraction)) * whole)


def refuse_duplicates(prefixes: Sequence[Path | str]) -> None:
    """Refuse a dataset that is listed twice, under whatever name."""
    seen: set[Path] = set()
    for prefix in prefixes:
        resolved = Path(prefix).resolve()
        if resolved in seen:
            raise UserError("data.train", f"{prefix} is listed twice", "list it once, with the sum of the weights")
        seen.add(resolved)


class ValidationSet:
    """Read a dataset once, in order, so that each token of the stream but the first is a target exactly once.

    Window w predicts tokens wT + 1 .. (w + 1)T from tokens wT .. (w + 1)T - 1; the last window is padded.

    Attributes:
        source: the dataset.
        prefix: the path of the dataset.
        sequence_length: T.
        windows: the number of windows.
        targets: the number of tokens predicted, one less than the stream has.
        words, text_bytes: the words and UTF-8 bytes of the text, from the manifest; None without one.

    Args:
        prefix: the path of the dataset without ``.bin``.
        sequence_length: T.
        vocab_size: the rows of the model's embedding; None leaves ids unchecked.

    Raises:
        UserError: the dataset cannot be trained on (see ``TokenSource``) or has fewer than two tokens.
    """

    def __init__(self, prefix: Path | str, sequence_length: int, *, vocab_size: int | None = None):
        self.source = TokenSource(prefix, vocab_size)
        self.prefix, self.sequence_length = self.source.prefix, sequence_length
        self.targets = self.source.tokens.size - 1
        if self.targets < 1:
            raise UserError(bin_path(prefix), "holds one token, so that there is nothing to predict", "use more text")
        self.windows = -(-self.targets // sequence_length)
        manifest = self.source.manifest
        self.words = manifest.words if manifest else None
        self.text_bytes = manifest.text_bytes if manifest else None

    def batch(self, first: int, last: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Read windows ``first`` to ``last - 1``.

        Returns:
            Inputs and targets, int64 (last - first, T). Beyond the end of the stream targets are -100 and inputs 0.
        """
        if not 0 <= first <= last <= self.windows:
            raise IndexError(f"windows {first} to {last} of {self.windows} in {self.prefix}")
        inputs = np.zeros((last - first, self.sequence_length), np.int64)
        targets = np.full((last - first, self.sequence_length), IGNORED_TARGET, np.int64)
        for row, window in enumerate(range(first, last)):
            start = window * self.sequence_length
            length = min(self.sequence_length, self.targets - start)
            tokens = np.empty(length + 1, np.int64)
            self.source.read(start, tokens)
            inputs[row, :length], targets[row, :length] = tokens[:-1], tokens[1:]
        return inputs, targets
