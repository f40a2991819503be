"""Read a dataset in Megatron's indexed format through a memory map, checked when it is opened."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megachiar.data.storage.files import bin_path, idx_path, temporary_path
from megachiar.data.storage.index_format import DTYPE_CODES, HEADER, INDEX_ROWS, MAGIC, VERSION
from megachiar.data.storage.regular_file import open_regular
from megachiar.errors import UserError

ROWS_CHECKED_ON_OPEN = 1 << 20  # see IndexedDataset


class IndexedDataset:
    """Read a dataset through a memory map, checked when it is opened so that it cannot fail in the middle of a run.

    Opening checks that both files exist and are not empty, swapped, cut short or grown. It checks that magic, version
    and type are known, and that document starts are in order. The counts must fit the size of the index, the pointers
    the lengths, and the lengths the size of ``.bin``. Pointers and document starts are checked row for row up to
    ``ROWS_CHECKED_ON_OPEN`` sequences. Of a longer index as many rows, spread evenly, are checked, so that opening
    takes milliseconds; ``check_index`` checks every row. Only the manifest's checksums can show whether the tokens are
    those that were written.

    Nothing is cached between objects: files rebuilt under the same name are read anew. The arrays are read-only, and
    keep the map alive by themselves.

    Attributes:
        prefix: the path of the dataset without ``.bin``.
        dtype: the type of the tokens.
        lengths: tokens of each sequence, int32 (sequences,).
        pointers: where each sequence begins in ``.bin``, in bytes, int64 (sequences,).
        document_starts: the first sequence of each document, then the number of sequences, int64 (documents + 1,).
        tokens: all tokens as one stream, (tokens,) of ``dtype``.
        documents: the number of documents.
        tells_documents: whether the index says where documents begin; if not, each sequence is a document.

    Args:
        prefix: the path of the dataset without ``.bin``.
        random_access: tokens will be read in random order: the kernel then reads only the pages that are touched,
            instead of hundreds of kilobytes around them. Call ``prefetch_hint`` before reading.

    Raises:
        UserError: one of the checks failed; the message names the file and what does not fit.
    """

    def __init__(self, prefix: Path | str, *, random_access: bool = False):
        self.prefix = Path(prefix)
        idx, bin_ = idx_path(prefix), bin_path(prefix)
        self._index_map = _map_file(idx, self.prefix)
        index = np.frombuffer(self._index_map, np.uint8)
        code, sequences, starts = _read_header(index, idx)
        self.dtype = DTYPE_CODES[code]
        index_bytes = HEADER.size + 12 * sequences + 8 * starts
        _check_index_size(index.size, index_bytes, sequences, starts, idx)
        first_pointer, first_start = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
        self.lengths = index[HEADER.size : first_pointer].view("<i4")
        self.pointers = index[first_pointer:first_start].view("<i8")
        self.document_starts = index[first_start:index_bytes].view("<i8")
        self.tells_documents = starts > 1
        if not self.tells_documents:
            self.document_starts = np.arange(sequences + 1, dtype="<i8")
        self.documents = self.document_starts.size - 1
        self._map = _map_file(bin_, self.prefix)
        self._random_access = random_access
        if random_access:
            self._map.madvise(mmap.MADV_RANDOM)
        self._check_stream_size(len(self._map), bin_)
        self._check_rows(_spread_rows(sequences))
        self._check_starts(_spread_rows(self.documents))
        self.tokens = np.frombuffer(self._map, self.dtype)

    def __len__(self) -> int:
        """Return the number of sequences."""
        return self.lengths.size

    def __getitem__(self, sequence: int) -> np.ndarray:
        """Return the tokens of one sequence, a read-only view of ``.bin``, (length,) of ``dtype``."""
        if not -len(self) <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)} in {self.prefix}")
        first = int(self.pointers[sequence]) // self.dtype.itemsize
        return self.tokens[first : first + int(self.lengths[sequence])]

    def __reduce__(self) -> tuple[Callable[..., IndexedDataset], tuple[Path, bool]]:  # another process maps the files
        return _open_again, (self.prefix, self._random_access)

    def prefetch_hint(self, token: int, length: int) -> None:
        """Ask the kernel to begin reading ``length`` tokens from ``token`` on, without waiting for them."""
        begin = token * self.dtype.itemsize
        page = begin - begin % mmap.PAGESIZE
        end = min(begin + length * self.dtype.itemsize, len(self._map))
        self._map.madvise(mmap.MADV_WILLNEED, page, end - page)

    def document(self, number: int) -> np.ndarray:
        """Return the tokens of all sequences of document ``number``, a read-only view, (length,) of ``dtype``."""
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents} in {self.prefix}")
        return self.tokens[self.token_of_document(number) : self.token_of_document(number + 1)]

    def token_of_document(self, number: int) -> int:
        """Return where document ``number`` begins in ``tokens``; ``number == documents`` gives the number of tokens."""
        sequence = int(self.document_starts[number])
        return self.tokens.size if sequence == len(self) else int(self.pointers[sequence]) // self.dtype.itemsize

    def document_of_token(self, token: int) -> int:
        """Return the document that ``tokens[token]`` belongs to, in O(log sequences)."""
        if not 0 <= token < self.tokens.size:
            raise IndexError(f"token {token} of {self.tokens.size} in {self.prefix}")
        sequence = int(np.searchsorted(self.pointers, token * self.dtype.itemsize, side="right")) - 1
        return int(np.searchsorted(self.document_starts, sequence, side="right")) - 1

    def check_index(self) -> None:
        """Check every row of the index, however long it is.

        Raises:
            UserError: a row does not fit the others.
        """
        self._check_rows(_all_rows(len(self)))
        self._check_starts(_all_rows(self.documents))

    def _check_stream_size(self, size: int, path: Path) -> None:
        """Check that ``.bin`` ends where the last sequence ends."""
        length, pointer = int(self.lengths[-1]), int(self.pointers[-1])
        expected = pointer + length * self.dtype.itemsize
        if size != expected:
            raise UserError(
                path,
                f"has {size:,} bytes, but {idx_path(self.prefix).name} describes {expected:,} bytes of "
                f"{self.dtype.name} in {len(self):,} sequences",
                "the file was cut short or belongs to another index: copy both again or preprocess again",
            )

    def _check_rows(self, rows: Iterator[slice]) -> None:
        """Check that lengths are not negative, and that each sequence begins where the one before it ends."""
        for part in rows:
            lengths, pointers = self.lengths[part].astype(np.int64), self.pointers[part]
            before = int(self.pointers[part.start - 1]) if part.start else 0
            before_length = int(self.lengths[part.start - 1]) if part.start else 0
            expected = before + np.cumsum(np.concatenate(([before_length], lengths[:-1]))) * self.dtype.itemsize
            wrong = (pointers != expected) | (lengths < 0)
            if wrong.any():
                row = int(np.argmax(wrong))
                raise _broken_index(
                    self.prefix,
                    f"sequence {part.start + row:,} has length {lengths[row]:,} and begins at byte {pointers[row]:,}, "
                    f"but the lengths before it end at byte {expected[row]:,}",
                )
            self._release_index_pages()

    def _check_starts(self, rows: Iterator[slice]) -> None:
        """Check that documents begin with sequence 0, are in order, and end with the last sequence."""
        if int(self.document_starts[0]) != 0 or int(self.document_starts[-1]) != len(self):
            raise _broken_index(
                self.prefix,
                f"documents span sequences {self.document_starts[0]:,} to {self.document_starts[-1]:,}, "
                f"but there are {len(self):,}",
            )
        for part in rows:
            starts = self.document_starts[part.start : part.stop + 1]
            if (starts[1:] < starts[:-1]).any():
                row = part.start + int(np.argmax(starts[1:] < starts[:-1]))
                raise _broken_index(self.prefix, f"document {row + 1:,} begins before document {row:,}")
            self._release_index_pages()

    def _release_index_pages(self) -> None:
        """Give the pages of the index that were read back to the kernel: a training run hardly reads it again."""
        self._index_map.madvise(mmap.MADV_DONTNEED)


def _open_again(prefix: Path, random_access: bool) -> IndexedDataset:
    return IndexedDataset(prefix, random_access=random_access)


def _map_file(path: Path, prefix: Path) -> mmap.mmap:
    """Map a file read-only; its pages are read when touched, and arrays made from the map keep it alive."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise UserError(path, "the file is empty", "copy it again or preprocess again")
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise UserError(path, "the file does not exist", _remedy_for_missing(path, prefix)) from None
    except OSError as error:
        raise UserError(path, f"cannot read: {error.strerror}", "give the prefix of a dataset you may read") from None


def _remedy_for_missing(path: Path, prefix: Path) -> str:
    """Suggest a remedy to a user who named a dataset that does not exist."""
    if prefix.suffix in (".bin", ".idx"):
        return f"a dataset is named without its suffix: try {prefix.with_suffix('')}"
    if temporary_path(path).exists():
        return f"{temporary_path(path).name} is what an unfinished run left: run the preprocessing again"
    return "give the path of PREFIX.bin and PREFIX.idx without the suffix, or preprocess first"


def _read_header(index: np.ndarray, path: Path) -> tuple[int, int, int]:
    """Return the type code, the number of sequences and the number of document starts."""
    if index.size < HEADER.size:
        raise UserError(path, f"has {index.size} bytes, but an index has at least {HEADER.size}", "preprocess again")
    magic, version, code, sequences, starts = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise UserError(
            path,
            f"begins with {magic!r}, not with {MAGIC!r}: this is no index",
            "check that .bin and .idx are not swapped, and that the dataset is of Megatron's MMIDIDX kind",
        )
    if version != VERSION:
        raise UserError(path, f"has version {version} of the format, but only {VERSION} is known", "preprocess again")
    if code not in DTYPE_CODES:
        known = ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPE_CODES.items())
        raise UserError(path, f"has type code {code} at byte 17, not {known}", "copy it again or preprocess again")
    return code, sequences, starts


def _check_index_size(size: int, expected: int, sequences: int, starts: int, path: Path) -> None:
    """Check that an index of ``size`` bytes holds what its header counts, and that it counts anything."""
    if size != expected:
        multimodal = " (a multimodal dataset of Megatron, which has one byte more per sequence, cannot be read)"
        raise UserError(
            path,
            f"has {size:,} bytes, but its header counts {sequences:,} sequences and {starts:,} document starts, "
            f"which take {expected:,} bytes" + (multimodal if size == expected + sequences else ""),
            "the file was cut short or overwritten: copy it again or preprocess again",
        )
    if sequences == 0 or starts == 0:
        raise UserError(path, f"holds {sequences:,} sequences and {starts:,} document starts", "preprocess again")


def _broken_index(prefix: Path, problem: str) -> UserError:
    return UserError(idx_path(prefix), problem, "the index is damaged: copy it again or preprocess again")


def _all_rows(rows: int) -> Iterator[slice]:
    """Yield all rows in parts that fit in memory."""
    for first in range(0, rows, INDEX_ROWS):
        yield slice(first, min(rows, first + INDEX_ROWS))


def _spread_rows(rows: int, blocks: int = 256) -> Iterator[slice]:
    """Yield all rows if they are at most ROWS_CHECKED_ON_OPEN, else as many in blocks, spread evenly, ends included."""
    if rows <= ROWS_CHECKED_ON_OPEN:
        yield from _all_rows(rows)
        return
    block = ROWS_CHECKED_ON_OPEN // blocks
    for number in range(blocks):
        first = (rows - block) * number // (blocks - 1)
        yield slice(first, first + block)
