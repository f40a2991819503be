"""The one definition of the indexed token file: Megatron's MMIDIDX version 1, byte for byte.

A dataset ``PREFIX`` is two files, all little-endian. A *sequence* is a run of tokens, a *document* one or more
sequences; megachiar writes one sequence per document and reads any.

    PREFIX.bin   the tokens of all sequences, one after another, nothing else
    PREFIX.idx   offset      type     what
                 0           9 bytes  b"MMIDIDX\\0\\0"
                 9           u64      version, 1
                 17          u8       code of the tokens' type, see DTYPE_CODES
                 18          u64      S, number of sequences
                 26          u64      D, number of documents + 1
                 34          i32[S]   length of each sequence, in tokens
                 34 + 4S     i64[S]   where each sequence begins in PREFIX.bin, in bytes
                 34 + 12S    i64[D]   the sequence each document begins with, and S at the end

GPT-NeoX's merge tool writes an index with D = 1: it loses where documents begin. As each of its documents is one
sequence, each sequence of such a dataset is read as a document.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import numpy as np

from megachiar.data.storage.files import (
    CHECKSUM_BLOCK,
    BlockChecksums,
    bin_path,
    block_checksums,
    idx_path,
    manifest_path,
    put_in_place,
    starts_path,
    temporary_path,
    write_temporary,
)
from megachiar.errors import UserError, disk_error, disk_errors

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
LARGEST_UINT16_VOCABULARY = 65_500  # Megatron's limit, exclusive
LONGEST_SEQUENCE = np.iinfo(np.int32).max  # tokens
INDEX_ROWS = 1 << 18  # sequences of an index handled at once: a few MB
ROWS_CHECKED_ON_OPEN = 1 << 20  # see IndexedDataset
WRITE_BUFFER = 1 << 20  # bytes
_START_AFRESH = "remove it, or pass --restart to begin from the first file"


def dtype_for_vocabulary(vocab_size: int) -> np.dtype:
    """The type Megatron stores token ids in: ``uint16`` for a vocabulary below 65,500, else ``int32``."""
    return np.dtype("<u2") if vocab_size < LARGEST_UINT16_VOCABULARY else np.dtype("<i4")


def dtype_code(dtype: np.dtype | type | str) -> int:
    """The format's code for ``dtype``.

    Raises:
        ValueError: the format has no code for it.
    """
    little_endian = np.dtype(dtype).newbyteorder("<")
    for code, known in DTYPE_CODES.items():
        if known == little_endian:
            return code
    raise ValueError(f"the indexed format cannot hold {np.dtype(dtype)}, only {[d.name for d in DTYPE_CODES.values()]}")


class BuilderState(NamedTuple):
    """How far a builder had come: all that is needed, with its temporary files, to go on from there.

    Attributes:
        documents, sequences, tokens, largest_token_id: as the builder's own.
        blocks: checksums of the full blocks of ``.bin``.
    """

    documents: int
    sequences: int
    tokens: int
    largest_token_id: int
    blocks: list[str]


class IndexedDatasetBuilder:
    """Write a dataset in bounded memory, so that it is whole when the ``with`` block ends and absent otherwise.

        with IndexedDatasetBuilder("data/train", dtype_for_vocabulary(32_000)) as builder:
            builder.add_document(ids)

    Everything goes to temporary names first. At the end both files are synced to the disk and put in their places, see
    ``put_in_place``. An exception, a full disk or a kill leaves no dataset. A writer that is to survive a kill asks for
    the ``state`` now and then, keeps it, and begins with it the next time.

    Attributes:
        documents, sequences, tokens: how many were added.
        largest_token_id: the largest id added, -1 before the first one.
        checksums: ``{"bin": [...], "idx": [...]}``, see ``BlockChecksums``; known when the files are complete.

    Args:
        prefix: path of the dataset without ``.bin``; its folder is made if missing.
        dtype: type of the tokens, one of ``DTYPE_CODES``.
        state: go on from there with the temporary files of an earlier builder; what it wrote later is dropped.

    Raises:
        UserError: the disk is full or read-only; a token id does not fit ``dtype``; another process is writing the
            same dataset; no token was added by the end; the temporary files are not those that ``state`` describes.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype | type | str, state: BuilderState | None = None):
        self.prefix = Path(prefix)
        self._code = dtype_code(dtype)
        self.dtype = DTYPE_CODES[self._code]
        self.documents, self.sequences, self.tokens, self.largest_token_id, blocks = state or BuilderState(
            0, 0, 0, -1, []
        )
        self.checksums: dict[str, list[str]] = {}
        self._digests = BlockChecksums(blocks)
        self._open = contextlib.ExitStack()
        with disk_errors(self.prefix):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._open.enter_context(open_locked(self._temporary["bin"]))
            try:
                self._idx = self._open.enter_context(open_locked(self._temporary["idx"]))
                self._starts = self._open.enter_context(open_locked(self._temporary["starts"]))
                self._begin()
            except UserError:
                self._open.close()  # what an earlier builder left stays as it is
                raise
            except BaseException:
                self.abort()
                raise

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            if not self.checksums:  # else it was finished inside the block
                self.finish()
        else:
            self.abort()

    def state(self) -> BuilderState:
        """How far this builder has come; all that was added until now survives a kill or a power cut.

        Raises:
            UserError: the disk is full.
        """
        self._sync("bin", "idx", "starts")
        return BuilderState(self.documents, self.sequences, self.tokens, self.largest_token_id, self._digests.whole)

    def add_document(self, tokens: np.ndarray | list[int]) -> None:
        """Add one document of one sequence. ``tokens``: whole numbers, any integer type, shape (n,)."""
        tokens = np.asarray(tokens)
        self.add_documents(tokens, np.array([tokens.size]))

    def add_documents(self, tokens: np.ndarray | list[int], lengths: np.ndarray | list[int]) -> None:
        """Add many documents of one sequence each, at the cost of one.

        Args:
            tokens: the documents' tokens one after another, shape (sum(lengths),), any integer type.
            lengths: tokens of each document, shape (documents,).
        """
        lengths = np.asarray(lengths, dtype=np.int64).reshape(-1)
        self.add_sequences(tokens, lengths, self.sequences + 1 + np.arange(lengths.size))

    def add_sequences(
        self, tokens: np.ndarray | list[int], lengths: np.ndarray | list[int], document_ends: np.ndarray | list[int]
    ) -> None:
        """Add sequences and say where documents end: what datasets of several sequences per document need.

        Args:
            tokens: the sequences' tokens one after another, shape (sum(lengths),).
            lengths: tokens of each sequence, shape (sequences,).
            document_ends: for each document that ends in here, the number of sequences of the whole dataset up to and
                with its last one.
        """
        tokens = np.asarray(tokens).reshape(-1)
        lengths = np.asarray(lengths, dtype=np.int64).reshape(-1)
        ends = np.asarray(document_ends, dtype=np.int64).reshape(-1)
        if lengths.sum() != tokens.size or (lengths < 0).any():
            raise ValueError(f"lengths sum to {lengths.sum():,} tokens, but {tokens.size:,} were given")
        if lengths.size and lengths.max() > LONGEST_SEQUENCE:
            raise UserError(
                self.prefix,
                f"a document of {lengths.max():,} tokens; the format holds at most {LONGEST_SEQUENCE:,}",
                "split the document",
            )
        stored = self._as_stored(tokens)
        with self._writing("bin"):
            self._bin.write(stored)
        with self._writing("idx"):
            self._idx.write(lengths.astype("<i4").tobytes())
        with self._writing("starts"):
            self._starts.write(ends.astype("<i8").tobytes())
        self._digests.update(stored)
        self.sequences += lengths.size
        self.documents += ends.size
        self.tokens += tokens.size

    def finish(self, make_manifest: Callable[[IndexedDatasetBuilder], bytes] | None = None) -> None:
        """Complete the dataset and put it under its final names; called by the end of the ``with`` block.

        Args:
            make_manifest: gives the manifest's content from this builder, whose checksums are known by then.
        """
        try:
            self.complete(make_manifest)
            with disk_errors(self.prefix):
                put_in_place(self.prefix)
        except BaseException:
            self.abort()
            raise
        self.close()

    def complete(self, make_manifest: Callable[[IndexedDatasetBuilder], bytes] | None = None) -> None:
        """Complete the files under their temporary names, for ``put_in_place``; see ``finish``."""
        if self.tokens == 0:
            raise UserError(self.prefix, "no token was written", "give input that holds at least one document")
        with self._writing("idx"):
            self._complete_index()
        self._sync("bin", "idx")
        self.checksums = {"bin": self._digests.digests(), "idx": block_checksums(self._temporary["idx"])}
        if make_manifest is not None:
            write_temporary(manifest_path(self.prefix), make_manifest(self))

    def close(self) -> None:
        """Let go of the files, which stay where they are, to be put in their places or gone on with."""
        with contextlib.suppress(OSError):  # closing writes what is still buffered, and a full disk refuses that too
            self._open.close()

    def abort(self) -> None:
        """Remove all that was written; what stood under the final names before stays as it was."""
        for path in (*self._temporary.values(), temporary_path(manifest_path(self.prefix))):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        self.close()

    @property
    def _temporary(self) -> dict[str, Path]:
        """What is written before it has its final name: tokens, index and, for a while, document starts."""
        return {
            "bin": temporary_path(bin_path(self.prefix)),
            "idx": temporary_path(idx_path(self.prefix)),
            "starts": starts_path(self.prefix),
        }

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Name the temporary file ``name`` where the disk refuses to write it."""
        try:
            yield
        except OSError as error:
            raise disk_error(self._temporary[name], error) from error

    def _sync(self, *names: str) -> None:
        """Make what was written so far survive a power cut."""
        files = {"bin": self._bin, "idx": self._idx, "starts": self._starts}
        for name in names:
            with self._writing(name):
                files[name].flush()
                os.fsync(files[name].fileno())

    def _begin(self) -> None:
        """Cut the temporary files to what the state describes, nothing at first, and go on at their ends."""
        partial = self.tokens * self.dtype.itemsize % CHECKSUM_BLOCK
        sizes = {
            self._bin: self.tokens * self.dtype.itemsize,
            self._idx: HEADER.size + 4 * self.sequences,
            self._starts: 8 * (self.documents + 1),
        }
        if self.sequences:
            for (file, size), path in zip(sizes.items(), self._temporary.values(), strict=True):
                found = os.fstat(file.fileno()).st_size
                if found < size:
                    raise UserError(
                        path, f"{found:,} bytes, but the journal beside it tells of {size:,}", _START_AFRESH
                    )
            self._bin.seek(sizes[self._bin] - partial)
            while partial > 0:
                data = self._bin.read(min(partial, WRITE_BUFFER))
                self._digests.update(data)
                partial -= len(data)
            for file, size in sizes.items():
                file.truncate(size)
                file.seek(size)
        else:
            for file in sizes:
                file.truncate(0)
            self._starts.write(np.zeros(1, "<i8").tobytes())
        self._idx.seek(0)
        self._idx.write(bytes(HEADER.size))  # zeros are no header: not an index until the very end
        self._idx.seek(sizes[self._idx])

    def _as_stored(self, tokens: np.ndarray) -> memoryview:
        """The bytes of ``tokens`` in the dataset's type; refuses what the type cannot hold."""
        if tokens.size == 0:
            return memoryview(b"")
        if tokens.dtype.kind not in "iu" and self.dtype.kind in "iu":
            raise ValueError(f"tokens of type {tokens.dtype} for a dataset of {self.dtype}: whole numbers are needed")
        if self.dtype.kind in "iu":
            smallest, largest = int(tokens.min()), int(tokens.max())
            limits = np.iinfo(self.dtype)
            if smallest < limits.min or largest > limits.max:
                raise UserError(
                    self.prefix,
                    f"token id {largest if largest > limits.max else smallest} does not fit {self.dtype.name}, "
                    f"which holds {limits.min} to {limits.max}",
                    "choose the type by the tokenizer's vocabulary, or check that this is the right tokenizer",
                )
            self.largest_token_id = max(self.largest_token_id, largest)
        return memoryview(np.ascontiguousarray(tokens, dtype=self.dtype)).cast("B")

    def _complete_index(self) -> None:
        """Append pointers and document starts to the lengths already in the index, and write its header."""
        self._idx.flush()
        with open(temporary_path(idx_path(self.prefix)), "rb") as written:
            written.seek(HEADER.size)
            pointer = 0
            for first in range(0, self.sequences, INDEX_ROWS):
                rows = min(INDEX_ROWS, self.sequences - first)
                sizes = np.frombuffer(written.read(4 * rows), "<i4").astype("<i8") * self.dtype.itemsize
                ends = pointer + np.cumsum(sizes)
                self._idx.write((ends - sizes).astype("<i8").tobytes())
                pointer = int(ends[-1])
        self._starts.seek(0)
        while block := self._starts.read(WRITE_BUFFER):
            self._idx.write(block)
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, self._code, self.sequences, self.documents + 1))


def open_locked(path: Path) -> BinaryIO:
    """Open ``path`` for writing with what it holds, and refuse if another process has it open this way.

    A process that came while the other one finished may hold a file that has since been renamed: then it looks again,
    or it would write into a finished dataset.
    """
    while True:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=WRITE_BUFFER)  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            remedy = "wait for it or choose another output"
            raise UserError(path, "another process is writing this dataset", remedy) from None
        except OSError as error:  # file systems without locks
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                file.close()
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


class IndexedDataset:
    """Read a dataset through a memory map, checked when it is opened so that it cannot fail in the middle of a run.

    Checked on open: both files are there, not empty, not swapped, not cut short nor grown; magic, version and type;
    counts against the size of the index; pointers against lengths; the sum of the lengths against the size of
    ``.bin``; document starts. Pointers and document starts are checked row for row up to ``ROWS_CHECKED_ON_OPEN``
    sequences, and in as many rows spread evenly beyond that, so that opening stays a matter of milliseconds;
    ``check_index`` checks every row. That tokens are what was written, only the manifest's checksum can tell.

    Nothing is cached between objects: files rebuilt under the same name are read anew. Arrays handed out keep the map
    alive by themselves and are read-only.

    Attributes:
        lengths: tokens of each sequence, int32 (sequences,).
        pointers: where each sequence begins in ``.bin``, bytes, int64 (sequences,).
        document_starts: first sequence of each document, then the number of sequences, int64 (documents + 1,).
        tokens: all tokens as one stream, (tokens,) of ``dtype``.
        documents: number of documents.
        tells_documents: whether the index says where documents begin; if not, each sequence is one.

    Args:
        prefix: path of the dataset without ``.bin``.
        random_access: tokens will be read here and there: the kernel then reads only what is touched, instead of
            hundreds of kilobytes around it. Give ``announce`` the places beforehand.

    Raises:
        UserError: one of the checks failed; it names the file and what does not fit.
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
        """Number of sequences."""
        return self.lengths.size

    def __getitem__(self, sequence: int) -> np.ndarray:
        """Tokens of one sequence, a read-only view of ``.bin``, (length,) of ``dtype``."""
        if not -len(self) <= sequence < len(self):
            raise IndexError(f"sequence {sequence} of {len(self)} in {self.prefix}")
        first = int(self.pointers[sequence]) // self.dtype.itemsize
        return self.tokens[first : first + int(self.lengths[sequence])]

    def __reduce__(self):  # another process maps the files itself
        return _open_again, (self.prefix, self._random_access)

    def announce(self, token: int, length: int) -> None:
        """Have the kernel begin to read ``length`` tokens from ``token`` on, which are wanted soon; does not wait."""
        begin = token * self.dtype.itemsize
        page = begin - begin % mmap.PAGESIZE
        end = min(begin + length * self.dtype.itemsize, len(self._map))
        self._map.madvise(mmap.MADV_WILLNEED, page, end - page)

    def document(self, number: int) -> np.ndarray:
        """Tokens of all sequences of document ``number``, a read-only view, (length,) of ``dtype``."""
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents} in {self.prefix}")
        return self.tokens[self.token_of_document(number) : self.token_of_document(number + 1)]

    def token_of_document(self, number: int) -> int:
        """Place in ``tokens`` where document ``number`` begins; the number of tokens for ``number == documents``."""
        sequence = int(self.document_starts[number])
        return self.tokens.size if sequence == len(self) else int(self.pointers[sequence]) // self.dtype.itemsize

    def document_of_token(self, token: int) -> int:
        """The document that ``tokens[token]`` belongs to, in O(log sequences)."""
        if not 0 <= token < self.tokens.size:
            raise IndexError(f"token {token} of {self.tokens.size} in {self.prefix}")
        sequence = int(np.searchsorted(self.pointers, token * self.dtype.itemsize, side="right")) - 1
        return int(np.searchsorted(self.document_starts, sequence, side="right")) - 1

    def check_index(self) -> None:
        """Check every row of the index, however long it is.

        Raises:
            UserError: a row does not fit.
        """
        self._check_rows(_all_rows(len(self)))
        self._check_starts(_all_rows(self.documents))

    def _check_stream_size(self, size: int, path: Path) -> None:
        length, pointer = int(self.lengths[-1]), int(self.pointers[-1])
        expected = pointer + length * self.dtype.itemsize
        if size != expected:
            raise UserError(
                path,
                f"{size:,} bytes, but {idx_path(self.prefix).name} describes {expected:,} bytes of "
                f"{self.dtype.name} in {len(self):,} sequences",
                "the file was cut short or belongs to another index: copy both again or preprocess again",
            )

    def _check_rows(self, rows: Iterator[slice]) -> None:
        """Lengths are not negative, and each sequence begins where the one before it ends."""
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
            self._let_go_of_index()

    def _check_starts(self, rows: Iterator[slice]) -> None:
        """Documents begin with sequence 0, in order, and end with the last sequence."""
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
            self._let_go_of_index()

    def _let_go_of_index(self) -> None:
        """Give back the pages of the index that were read: a training run hardly looks at it again."""
        self._index_map.madvise(mmap.MADV_DONTNEED)


def _open_again(prefix: Path, random_access: bool) -> IndexedDataset:
    return IndexedDataset(prefix, random_access=random_access)


def _map_file(path: Path, prefix: Path) -> mmap.mmap:
    """A file's bytes, read-only, read when touched; arrays made from the map keep it alive."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise UserError(path, "the file is empty", "copy it again or preprocess again")
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise UserError(path, "the file does not exist", _remedy_for_missing(path, prefix)) from None
    except OSError as error:
        raise UserError(path, f"cannot read: {error.strerror}", "give the prefix of a dataset you may read") from None


def _remedy_for_missing(path: Path, prefix: Path) -> str:
    if prefix.suffix in (".bin", ".idx"):
        return f"a dataset is named without its suffix: try {prefix.with_suffix('')}"
    if temporary_path(path).exists():
        return f"{temporary_path(path).name} is what an unfinished run left: run the preprocessing again"
    return "give the path of PREFIX.bin and PREFIX.idx without the suffix, or preprocess first"


def _read_header(index: np.ndarray, path: Path) -> tuple[int, int, int]:
    """Type code, number of sequences and number of document starts."""
    if index.size < HEADER.size:
        raise UserError(path, f"{index.size} bytes, an index has at least {HEADER.size}", "preprocess again")
    magic, version, code, sequences, starts = HEADER.unpack(index[: HEADER.size].tobytes())
    if magic != MAGIC:
        raise UserError(
            path,
            f"begins with {magic!r}, not with {MAGIC!r}: this is no index",
            "check that .bin and .idx are not swapped, and that the dataset is of Megatron's MMIDIDX kind",
        )
    if version != VERSION:
        raise UserError(path, f"version {version} of the format, only {VERSION} is known", "preprocess again")
    if code not in DTYPE_CODES:
        known = ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPE_CODES.items())
        raise UserError(path, f"type code {code} at byte 17; known are {known}", "copy it again or preprocess again")
    return code, sequences, starts


def _check_index_size(size: int, expected: int, sequences: int, starts: int, path: Path) -> None:
    if size != expected:
        multimodal = " (a multimodal dataset of Megatron, which has one byte more per sequence, cannot be read)"
        raise UserError(
            path,
            f"{size:,} bytes, but its header counts {sequences:,} sequences and {starts:,} document starts, "
            f"which take {expected:,} bytes" + (multimodal if size == expected + sequences else ""),
            "the file was cut short or overwritten: copy it again or preprocess again",
        )
    if sequences == 0 or starts == 0:
        raise UserError(path, f"holds {sequences:,} sequences and {starts:,} document starts", "preprocess again")


def _broken_index(prefix: Path, problem: str) -> UserError:
    return UserError(idx_path(prefix), problem, "the index is damaged: copy it again or preprocess again")


def _all_rows(rows: int) -> Iterator[slice]:
    """All rows in parts that fit in memory."""
    for first in range(0, rows, INDEX_ROWS):
        yield slice(first, min(rows, first + INDEX_ROWS))


def _spread_rows(rows: int, blocks: int = 256) -> Iterator[slice]:
    """All rows if they are at most ROWS_CHECKED_ON_OPEN, else that many in evenly spread blocks, ends included."""
    if rows <= ROWS_CHECKED_ON_OPEN:
        yield from _all_rows(rows)
        return
    block = ROWS_CHECKED_ON_OPEN // blocks
    for number in range(blocks):
        first = (rows - block) * number // (blocks - 1)
        yield slice(first, first + block)
