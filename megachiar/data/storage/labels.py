"""Hold the class of each document of a labelled dataset: ``PREFIX.labels.npy`` beside ``PREFIX.bin``.

In a labelled dataset each document holds the tokens of one example, at least one, with no end-of-document token and no
padding. The file of its labels is what ``numpy.save`` writes for int32 (documents,), byte for byte:

    offset   type               what
    0        128 bytes          numpy's header of version 1.0
    128      i32[documents]     the number of each document's class, in order, little-endian

The manifest has the names of the classes and the checksums of the file. A class's number is the place of its name.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megachiar.data.storage.files import (
    BlockChecksums,
    bin_path,
    idx_path,
    labels_path,
    manifest_path,
    write_atomically,
)
from megachiar.data.storage.manifest import (
    LABELS_HEADER_BYTES,
    LabelsRecord,
    Manifest,
    check_labels_size,
    compare_checksums,
    problem_of_classes,
    read_manifest,
    write_manifest,
)
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.regular_file import read_regular
from megachiar.errors import UserError, disk_errors

MOST_SHOWN = 20  # classes of a description
LABEL_DTYPE = np.dtype("<i4")
PREPROCESS_AGAIN = "copy the dataset again, or preprocess again with --label-key"
_MAGIC = b"\x93NUMPY"
_OTHER_ARRAY = re.compile(rb"'descr': '([^']{1,16})'.{0,64}'shape': (\([0-9, ]{0,64}\))", re.DOTALL)


@dataclass(frozen=True)
class Labels:
    """Hold the class of each document of a dataset.

    Attributes:
        classes: the name of each class; a class's number is its place here.
        numbers: the number of each document's class, int32 (documents,), read-only, all from 0 to classes - 1.
    """

    classes: tuple[str, ...]
    numbers: NDArray[np.int32]

    def counts(self) -> dict[str, int]:
        """Return how many documents each class has; a class without documents has 0."""
        return dict(zip(self.classes, np.bincount(self.numbers, minlength=len(self.classes)).tolist(), strict=True))

    def describe(self) -> str:
        """Return text such as ``2 classes: neg 12,500, pos 12,500``, with the first ``MOST_SHOWN`` of many classes."""
        counts = self.counts()
        shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:MOST_SHOWN])
        more = f" and {len(counts) - MOST_SHOWN:,} more" if len(counts) > MOST_SHOWN else ""
        return f"{len(counts):,} {'class' if len(counts) == 1 else 'classes'}: {shown}{more}"


def labels_header(documents: int) -> bytes:
    """Return the first bytes of a file of so many labels, as numpy writes them."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": LABEL_DTYPE.str, "fortran_order": False, "shape": (documents,)}
    )
    assert header.tell() == LABELS_HEADER_BYTES, "numpy pads a header to a multiple of 64 bytes"
    return header.getvalue()


def read_labels(prefix: Path | str, manifest: Manifest | None, documents: int) -> Labels:
    """Read the labels of a dataset whole, and compare them with their checksums.

    Args:
        prefix: the path of the dataset without ``.bin``.
        manifest: its manifest, from ``read_manifest``.
        documents: the number of its documents.

    Raises:
        UserError: the dataset has no labels, or the file of the labels is missing, is not as ``write_labels`` writes
            it, was altered, or names a class that the manifest does not have.
    """
    if manifest is None or manifest.labels is None:
        what = "has no manifest" if manifest is None else "has no labels: its manifest names no classes"
        raise UserError(prefix, what, "make a labelled dataset with `megachiar preprocess --label-key KEY`")
    numbers = read_numbers(prefix, documents, manifest.labels.checksums)
    _check_numbers(labels_path(prefix), numbers, len(manifest.labels.classes))
    return Labels(tuple(manifest.labels.classes), numbers)


def read_numbers(prefix: Path | str, documents: int, checksums: list[str]) -> NDArray[np.int32]:
    """Return the class numbers of a dataset that need not have a manifest yet, int32 (documents,), read-only.

    Args:
        prefix: the path of the dataset without ``.bin``.
        documents: the number of its documents.
        checksums: those that the file's blocks had when they were written.

    Raises:
        UserError: ``read_labels`` says when.
    """
    path = labels_path(prefix)
    check_labels_size(prefix, documents)
    with disk_errors(path, "read"):
        content = read_regular(path)
    if not content.startswith(labels_header(documents)):
        _refuse_header(path, content, documents)
    digests = BlockChecksums()
    digests.update(content)
    compare_checksums(path, digests.digests(), checksums)
    return np.frombuffer(content, LABEL_DTYPE, offset=LABELS_HEADER_BYTES)


def write_labels(prefix: Path | str, numbers: ArrayLike, classes: Sequence[str]) -> Labels:
    """Give a dataset that has a manifest labels, or other ones: write the file, then the manifest that tells of it.

    Args:
        prefix: the path of the dataset without ``.bin``.
        numbers: the number of each document's class, whole numbers (documents,).
        classes: the names of the classes.

    Raises:
        UserError: the dataset has no manifest, a document has no tokens, the numbers do not fit documents or classes,
            a name is empty or occurs twice, or the disk is full.
    """
    manifest, path = read_manifest(prefix), labels_path(prefix)
    if manifest is None:
        raise UserError(manifest_path(prefix), "there is no manifest, which names the classes", "preprocess again")
    given = np.asarray(numbers)
    if given.dtype.kind not in "iu" or given.shape != (manifest.documents,):
        raise UserError(
            path,
            f"labels of type {given.dtype} and shape {given.shape} for {manifest.documents:,} documents",
            "give one whole number for each document",
        )
    if problem := problem_of_classes(classes):
        raise UserError(path, problem, "give each class one name")
    _check_numbers(path, given, len(classes))
    refuse_empty_examples(IndexedDataset(prefix))
    content = labels_header(given.size) + given.astype(LABEL_DTYPE).tobytes()
    digests = BlockChecksums()
    digests.update(content)
    write_atomically(path, content)
    record = LabelsRecord(classes=list(classes), checksums=digests.digests())
    write_manifest(prefix, replace(manifest, labels=record))
    return Labels(tuple(classes), np.frombuffer(content, LABEL_DTYPE, offset=LABELS_HEADER_BYTES))


def refuse_empty_examples(dataset: IndexedDataset) -> None:
    """Refuse a labelled dataset with a document of no tokens, of which no model could say anything.

    Raises:
        UserError: there is one; the message has its number.
    """
    ends = np.append(dataset.pointers // dataset.dtype.itemsize, dataset.tokens.size)[dataset.document_starts]
    empty = np.flatnonzero(np.diff(ends) == 0)
    if empty.size:
        problem = f"document {empty[0]:,} has a label and no token"
        raise UserError(idx_path(dataset.prefix), problem, f"leave empty examples out of {bin_path(dataset.prefix)}")


def _check_numbers(path: Path, numbers: NDArray[Any], classes: int) -> None:
    """Refuse a number that is no class's."""
    wrong = (numbers < 0) | (numbers >= classes)
    if wrong.any():
        document = int(np.argmax(wrong))
        raise UserError(
            path,
            f"document {document:,} has class number {numbers[document]}, but classes are 0 to {classes - 1}",
            PREPROCESS_AGAIN,
        )


def _refuse_header(path: Path, content: bytes, documents: int) -> NoReturn:
    """Say how a file differs from int32 labels of so many documents; its own header is never evaluated."""
    other = _OTHER_ARRAY.search(content[:LABELS_HEADER_BYTES])
    if not content.startswith(_MAGIC):
        problem = f"begins with {content[:8]!r}, not with numpy's {_MAGIC!r}: these are no labels"
    elif other is not None:
        problem = (
            f"holds {other[1].decode(errors='replace')} of shape {other[2].decode()} in {len(content):,} bytes, "
            f"not int32 ('<i4') of shape ({documents},)"
        )
    else:
        problem = f"is no file of numpy's version 1.0 that holds int32 of shape ({documents},)"
    raise UserError(path, problem, PREPROCESS_AGAIN)
