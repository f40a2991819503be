"""Shuffle a dataset's documents by key, in bounded memory and with sequential reads and writes only.

    documents in order --scatter--> buckets, one per stretch of the new order --gather--> documents in the new order
                        (one pass over the tokens)                       (each bucket fits in the page cache)

Document i moves to index ``permute(i)``. The order depends only on the seed and the number of documents, so that merged
shards give the same order as one process.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megachiar.data.permutation import permute, round_keys, unpermute
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.writer import IndexedDatasetBuilder
from megachiar.errors import disk_errors

BUCKET_BYTES = 1 << 28  # bytes of tokens that a bucket should have
MOST_BUCKETS = 256  # open files; more data makes larger buckets, which are mapped, not read into memory
BLOCK_BYTES = 1 << 25  # bytes of tokens that are scattered or gathered at once
BLOCK_DOCUMENTS = 1 << 18  # documents that are scattered or gathered at once


def unshuffled(prefix: Path | str) -> Path:
    """Return the prefix of the dataset that holds the documents of ``prefix`` before they are shuffled."""
    return Path(f"{prefix}.unshuffled")


def shuffle_documents(
    dataset: IndexedDataset,
    builder: IndexedDatasetBuilder,
    seed: int,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Add the documents of ``dataset``, with all their sequences, to ``builder`` in the order that ``seed`` gives.

    Buckets are unnamed files in the output's folder; together they are as large as the dataset.

    Args:
        dataset: the documents in their first order.
        builder: the output.
        seed: the seed of the order.
        on_bytes: called with the number of bytes of each block that is done.

    Raises:
        UserError: the disk is full.
    """
    keys = round_keys("documents", seed)
    count = min(MOST_BUCKETS, max(1, -(-dataset.tokens.nbytes // BUCKET_BYTES)), dataset.documents)
    bounds = [dataset.documents * number // count for number in range(count + 1)]  # of indices in the new order
    with contextlib.ExitStack() as stack, disk_errors(builder.prefix):
        folder = builder.prefix.parent
        buckets: list[BinaryIO] = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(count)]
        for first, last in _blocks(dataset, np.arange(dataset.documents)):
            _scatter(dataset, first, last, keys, np.array(bounds), buckets)
        for bucket, (first, last) in zip(buckets, itertools.pairwise(bounds), strict=True):
            bucket.flush()
            _gather(dataset, unpermute(np.arange(first, last), dataset.documents, keys), bucket, builder, on_bytes)
            bucket.truncate(0)  # frees its space on the disk


def shuffled_order(documents: int, seed: int) -> NDArray[Any]:
    """Return the old index of each document in the new order, int64 (documents,)."""
    return unpermute(np.arange(documents), documents, round_keys("documents", seed))


def _scatter(
    dataset: IndexedDataset, first: int, last: int, keys: NDArray[Any], bounds: NDArray[Any], buckets: list[BinaryIO]
) -> None:
    """Append documents ``first`` to ``last - 1`` to the buckets of their new indices, in order."""
    starts, ends = _extents(dataset, np.arange(first, last))
    indices = permute(np.arange(first, last), dataset.documents, keys)
    numbers = np.searchsorted(bounds, indices, side="right") - 1
    by_bucket = np.argsort(numbers, kind="stable")
    for number, members in itertools.groupby(by_bucket.tolist(), key=numbers.__getitem__):
        pieces = [dataset.tokens[starts[row] : ends[row]] for row in members]
        buckets[number].write(np.concatenate(pieces).tobytes())


def _gather(
    dataset: IndexedDataset,
    documents: NDArray[Any],
    bucket: BinaryIO,
    builder: IndexedDatasetBuilder,
    on_bytes: Callable[[int], None] | None,
) -> None:
    """Add ``documents``, given in their new order and stored in ``bucket`` in the old one, to ``builder``."""
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


def _blocks(dataset: IndexedDataset, documents: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Cut ``documents`` into stretches of about ``BLOCK_BYTES``; yield the first row and the one after the last."""
    limit = BLOCK_BYTES // dataset.dtype.itemsize
    for begin in range(0, documents.size, BLOCK_DOCUMENTS):
        starts, ends = _extents(dataset, documents[begin : begin + BLOCK_DOCUMENTS])
        total, first = np.cumsum(ends - starts), 0
        while first < total.size:
            done = int(total[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(total, done + limit, side="right")))
            yield begin + first, begin + last
            first = last


def _extents(dataset: IndexedDataset, documents: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the first token of each document and the one after its last, both int64 (n,)."""
    first, after = dataset.document_starts[documents], dataset.document_starts[documents + 1]
    return _token_of(dataset, first), _token_of(dataset, after)


def _token_of(dataset: IndexedDataset, sequences: NDArray[Any]) -> NDArray[Any]:
    """Return the first token of each sequence, int64 (n,); beyond the last sequence, the number of tokens."""
    inside = np.minimum(sequences, len(dataset) - 1)
    begins = dataset.pointers[inside] // dataset.dtype.itemsize
    return np.where(sequences < len(dataset), begins, dataset.tokens.size)


def _sequences(dataset: IndexedDataset, documents: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the lengths of all sequences of ``documents``, and how many sequences there are up to each one's end."""
    first, after = dataset.document_starts[documents], dataset.document_starts[documents + 1]
    ends = np.cumsum(after - first)
    rows = np.arange(int(ends[-1])) + np.repeat(first - (ends - (after - first)), after - first)
    return dataset.lengths[rows], ends
