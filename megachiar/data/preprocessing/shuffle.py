"""Shuffle a dataset's documents by key, in bounded memory and with sequential reads and writes only.

    documents in order --scatter--> buckets, one per stretch of the new order --gather--> documents in the new order
                        (one pass over the tokens)                       (each bucket lies in the page cache)

Document i goes to place ``permute(i)``: the order depends on the seed and the number of documents alone, so that
shards made side by side and then merged give what one process gives.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megachiar.data.permutation import permute, round_keys, unpermute
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import disk_errors

BUCKET_BYTES = 1 << 28  # tokens that a bucket aims at
MOST_BUCKETS = 256  # open files; beyond that buckets grow, and they are mapped, not read into memory
BLOCK_BYTES = 1 << 25  # tokens that are scattered or gathered at once
BLOCK_DOCUMENTS = 1 << 18  # and documents


def unshuffled(prefix: Path | str) -> Path:
    """Where the documents of dataset ``prefix`` wait in their first order to be shuffled."""
    return Path(f"{prefix}.unshuffled")


def shuffle_documents(
    dataset: IndexedDataset,
    builder: IndexedDatasetBuilder,
    seed: int,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Add the documents of ``dataset``, with all their sequences, to ``builder`` in the order that ``seed`` makes.

    Buckets are nameless files in the output's folder, as large as the dataset together.

    Args:
        on_bytes: called with the number of bytes of each block that is done.

    Raises:
        UserError: the disk is full.
    """
    keys = round_keys("documents", seed)
    count = min(MOST_BUCKETS, max(1, -(-dataset.tokens.nbytes // BUCKET_BYTES)), dataset.documents)
    bounds = [dataset.documents * number // count for number in range(count + 1)]  # of places in the new order
    with contextlib.ExitStack() as stack, disk_errors(builder.prefix):
        folder = builder.prefix.parent
        buckets = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(count)]
        for first, last in _blocks(dataset, np.arange(dataset.documents)):
            _scatter(dataset, first, last, keys, np.array(bounds), buckets)
        for bucket, (first, last) in zip(buckets, itertools.pairwise(bounds), strict=True):
            bucket.flush()
            _gather(dataset, unpermute(np.arange(first, last), dataset.documents, keys), bucket, builder, on_bytes)
            bucket.truncate(0)  # its room on the disk is free again


def _scatter(
    dataset: IndexedDataset, first: int, last: int, keys: np.ndarray, bounds: np.ndarray, buckets: list[BinaryIO]
) -> None:
    """Append documents ``first`` to ``last - 1`` to the buckets of their new places, in order."""
    starts, ends = _extents(dataset, np.arange(first, last))
    places = permute(np.arange(first, last), dataset.documents, keys)
    numbers = np.searchsorted(bounds, places, side="right") - 1
    by_bucket = np.argsort(numbers, kind="stable")
    for number, members in itertools.groupby(by_bucket.tolist(), key=numbers.__getitem__):
        pieces = [dataset.tokens[starts[row] : ends[row]] for row in members]
        buckets[number].write(np.concatenate(pieces).tobytes())


def _gather(
    dataset: IndexedDataset,
    documents: np.ndarray,
    bucket: BinaryIO,
    builder: IndexedDatasetBuilder,
    on_bytes: Callable[[int], None] | None,
) -> None:
    """Add ``documents``, given in their new order and lying in ``bucket`` in the old one, to ``builder``."""
    old_order = np.argsort(documents, kind="stable")
    starts, ends = _extents(dataset, documents)
    sizes = ends - starts
    if not sizes.sum():
        tokens = dataset.tokens[:0]
    else:
        tokens = np.memmap(bucket, dataset.dtype, mode="r")
    begins = np.empty_like(sizes)  # in the bucket
    begins[old_order] = np.cumsum(sizes[old_order]) - sizes[old_order]
    for first, last in _blocks(dataset, documents):
        rows = range(first, last)
        taken = np.concatenate([tokens[begins[row] : begins[row] + sizes[row]] for row in rows])
        lengths, document_ends = _sequences(dataset, documents[first:last])
        builder.add_sequences(taken, lengths, builder.sequences + document_ends)
        if on_bytes is not None:
            on_bytes(taken.nbytes)


def _blocks(dataset: IndexedDataset, documents: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut ``documents`` into stretches of about ``BLOCK_BYTES``; gives the first row and the one after the last."""
    limit = BLOCK_BYTES // dataset.dtype.itemsize
    for begin in range(0, documents.size, BLOCK_DOCUMENTS):
        starts, ends = _extents(dataset, documents[begin : begin + BLOCK_DOCUMENTS])
        total, first = np.cumsum(ends - starts), 0
        while first < total.size:
            done = int(total[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(total, done + limit, side="right")))
            yield begin + first, begin + last
            first = last


def _extents(dataset: IndexedDataset, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First token of each document and the one after its last, int64 (n,)."""
    first, after = dataset.document_starts[documents], dataset.document_starts[documents + 1]
    return _token_of(dataset, first), _token_of(dataset, after)


def _token_of(dataset: IndexedDataset, sequences: np.ndarray) -> np.ndarray:
    inside = np.minimum(sequences, len(dataset) - 1)
    begins = dataset.pointers[inside] // dataset.dtype.itemsize
    return np.where(sequences < len(dataset), begins, dataset.tokens.size)


def _sequences(dataset: IndexedDataset, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of all sequences of ``documents``, one after another, and how many there are up to each one's end."""
    first, after = dataset.document_starts[documents], dataset.document_starts[documents + 1]
    ends = np.cumsum(after - first)
    rows = np.arange(int(ends[-1])) + np.repeat(first - (ends - (after - first)), after - first)
    return dataset.lengths[rows], ends
