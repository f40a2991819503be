"""Write a dataset in Megatron's indexed format: whole or not there, in bounded memory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megachiar.data.storage.files import (
    CHECKSUM_BLOCK,
    BlockChecksums,
    as_bytes,
    bin_path,
    block_checksums,
    found_labels_path,
    idx_path,
    labels_path,
    manifest_path,
    put_in_place,
    starts_path,
    temporary_path,
    write_temporary,
)
from megachiar.data.storage.index_format import DTYPE_CODES, HEADER, INDEX_ROWS, MAGIC, VERSION, dtype_code
from megachiar.data.storage.manifest import Checksums
from megachiar.data.storage.regular_file import check_regular
from megachiar.errors import UserError, disk_error, disk_errors

LONGEST_SEQUENCE = np.iinfo(np.int32).max  # tokens
WRITE_BUFFER = 1 << 20  # bytes
START_AFRESH = "remove it, or pass --restart to begin from the first file"


class BuilderState(NamedTuple):
    """Record how far a builder has come, so that it can be continued with its temporary files.

    Attributes:
        documents, sequences, tokens, largest_token_id: the builder's attributes of these names.
        blocks: the checksums of the full blocks of ``.bin``.
        unfinished_block: the checksum of the bytes after them; None in the journals of earlier versions.
        lengths_checksum, starts_checksum: CRC-32 of the lengths and of the document starts; None as before.
    """

    documents: int
    sequences: int
    tokens: int
    largest_token_id: int
    blocks: list[str]
    unfinished_block: str | None = None
    lengths_checksum: int | None = None
    starts_checksum: int | None = None


class IndexedDatasetBuilder:
    """Write a dataset in bounded memory, so that it is whole when the ``with`` block ends and absent otherwise.

        with IndexedDatasetBuilder("data/train", dtype_for_vocabulary(32_000)) as builder:
            builder.add_document(ids)

    Everything is written under temporary names first. At the end both files are synced to the disk and get their final
    names, see ``put_in_place``. An exception, a full disk or a kill leaves no dataset. To survive a kill, a caller
    saves the ``state`` now and then, and passes it to the next builder.

    Attributes:
        prefix: the path of the dataset without ``.bin``.
        dtype: the type of the tokens as stored, little-endian.
        documents, sequences, tokens: how many were added.
        largest_token_id: the largest id added; -1 before the first one.
        checksums: the digests of the files' blocks; empty until the files are complete.

    Args:
        prefix: the path of the dataset without ``.bin``; its folder is made if missing.
        dtype: the type of the tokens, one of ``DTYPE_CODES``.
        state: how far an earlier builder had come; its temporary files are continued, and all that it wrote later is
            dropped.

    Raises:
        UserError: the disk is full or read-only, a token id does not fit ``dtype``, or no token was added by the end.
            Another process is writing the same dataset, or the temporary files do not fit ``state``.
    """

    def __init__(self, prefix: Path | str, dtype: np.dtype[Any] | type | str, state: BuilderState | None = None):
        self.prefix = Path(prefix)
        self._code = dtype_code(dtype)
        self.dtype = DTYPE_CODES[self._code]
        state = state or BuilderState(0, 0, 0, largest_token_id=-1, blocks=[], lengths_checksum=0, starts_checksum=0)
        self.documents = state.documents
        self.sequences = state.sequences
        self.tokens = state.tokens
        self.largest_token_id = state.largest_token_id
        self.checksums = Checksums(bin=[], idx=[])
        self._digests = BlockChecksums(state.blocks)
        self._lengths_checksum = state.lengths_checksum
        self._starts_checksum = state.starts_checksum
        self._open = contextlib.ExitStack()
        with disk_errors(self.prefix):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._bin = self._open.enter_context(open_locked(self._temporary["bin"]))
            try:
                self._idx = self._open.enter_context(open_locked(self._temporary["idx"]))
                self._starts = self._open.enter_context(open_locked(self._temporary["starts"]))
                self._begin(state.unfinished_block)
            except UserError:
                self._open.close()  # an earlier builder's files stay as they are
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
            if not self.checksums.idx:  # else it was finished inside the block
                self.finish()
        else:
            self.abort()

    def state(self) -> BuilderState:
        """Return how far this builder has come; all that was added until now survives a kill or a power cut.

        Raises:
            UserError: the disk is full.
        """
        self._sync("bin", "idx", "starts")
        return BuilderState(
            documents=self.documents,
            sequences=self.sequences,
            tokens=self.tokens,
            largest_token_id=self.largest_token_id,
            blocks=self._digests.whole,
            unfinished_block=self._digests.unfinished(),
            lengths_checksum=self._lengths_checksum,
            starts_checksum=self._starts_checksum,
        )

    def add_document(self, tokens: NDArray[Any] | list[int]) -> None:
        """Add one document of one sequence; ``tokens`` has shape (n,) and any integer type."""
        tokens = np.asarray(tokens)
        self.add_documents(tokens, np.array([tokens.size]))

    def add_documents(self, tokens: NDArray[Any] | list[int], lengths: NDArray[Any] | list[int]) -> None:
        """Add many documents of one sequence each; it costs hardly more than adding one.

        Args:
            tokens: the documents' tokens one after another, shape (sum(lengths),), any integer type.
            lengths: the number of tokens of each document, shape (documents,).
        """
        lengths = np.asarray(lengths, dtype=np.int64).reshape(-1)
        self.add_sequences(tokens, lengths, self.sequences + 1 + np.arange(lengths.size))

    def add_sequences(
        self,
        tokens: NDArray[Any] | list[int],
        lengths: NDArray[Any] | list[int],
        document_ends: NDArray[Any] | list[int],
    ) -> None:
        """Add sequences, and say where documents end; a document may have several sequences.

        Args:
            tokens: the sequences' tokens one after another, shape (sum(lengths),).
            lengths: the number of tokens of each sequence, shape (sequences,).
            document_ends: for each document that ends among these sequences, the number of sequences of the whole
                dataset up to and including its last one.
        """
        tokens = np.asarray(tokens).reshape(-1)
        lengths = np.asarray(lengths, dtype=np.int64).reshape(-1)
        ends = np.asarray(document_ends, dtype=np.int64).reshape(-1)
        if lengths.sum() != tokens.size or (lengths < 0).any():
            raise ValueError(f"lengths sum to {lengths.sum():,} tokens, but {tokens.size:,} were given")
        if lengths.size and lengths.max() > LONGEST_SEQUENCE:
            raise UserError(
                self.prefix,
                f"a document has {lengths.max():,} tokens, but the format holds at most {LONGEST_SEQUENCE:,}",
                "split the document",
            )
        stored = self._as_stored(tokens)
        with self._writing("bin"):
            self._bin.write(stored)
        with self._writing("idx"):
            self._idx.write(content := lengths.astype("<i4").tobytes())
            self._lengths_checksum = _continued(self._lengths_checksum, content)
        with self._writing("starts"):
            self._write_starts(ends)
        self._digests.update(stored)
        self.sequences += lengths.size
        self.documents += ends.size
        self.tokens += tokens.size

    def finish(self, make_manifest: Callable[[IndexedDatasetBuilder], bytes] | None = None) -> None:
        """Complete the dataset and give it its final names; the end of the ``with`` block calls this.

        Args:
            make_manifest: returns the manifest's content from this builder, whose checksums are known by then.
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
        """Complete the files under their temporary names, so that ``put_in_place`` can rename them; see ``finish``."""
        if self.tokens == 0:
            raise UserError(self.prefix, "no token was written", "give input that holds at least one document")
        with self._writing("idx"):
            self._complete_index()
        self._sync("bin", "idx")
        self.checksums = Checksums(bin=self._digests.digests(), idx=block_checksums(self._temporary["idx"]))
        if make_manifest is not None:
            write_temporary(manifest_path(self.prefix), make_manifest(self))

    def close(self) -> None:
        """Close the temporary files, which stay where they are, to be renamed or continued."""
        with contextlib.suppress(OSError):  # closing writes buffered bytes, and a full disk refuses that too
            self._open.close()

    def abort(self) -> None:
        """Remove all that was written; files that existed under the final names stay as they were."""
        written = (temporary_path(path(self.prefix)) for path in (manifest_path, labels_path))
        for path in (*self._temporary.values(), *written, found_labels_path(self.prefix)):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        self.close()

    @property
    def _temporary(self) -> dict[str, Path]:
        """Return the files that are written before they get their final names: tokens, index and document starts."""
        return {
            "bin": temporary_path(bin_path(self.prefix)),
            "idx": temporary_path(idx_path(self.prefix)),
            "starts": starts_path(self.prefix),
        }

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turn an error of the disk inside the block into one that names the temporary file ``name``."""
        try:
            yield
        except OSError as error:
            raise disk_error(self._temporary[name], error) from error

    def _sync(self, *names: str) -> None:
        """Sync the files ``names`` to the disk, so that their content survives a power cut."""
        files = {"bin": self._bin, "idx": self._idx, "starts": self._starts}
        for name in names:
            with self._writing(name):
                files[name].flush()
                os.fsync(files[name].fileno())

    def _write_starts(self, sequences: NDArray[Any]) -> None:
        self._starts.write(content := sequences.astype("<i8").tobytes())
        self._starts_checksum = _continued(self._starts_checksum, content)

    def _begin(self, unfinished_block: str | None) -> None:
        """Cut the temporary files to the sizes that the state describes, and go on at their ends.

        Args:
            unfinished_block: the checksum of the bytes after the full blocks, if the state has it.
        """
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
                        path, f"has {found:,} bytes, but the journal beside it tells of {size:,}", START_AFRESH
                    )
            self._bin.seek(sizes[self._bin] - partial)
            while partial > 0:
                data = self._bin.read(min(partial, WRITE_BUFFER))
                self._digests.update(data)
                partial -= len(data)
            if unfinished_block is not None and self._digests.unfinished() != unfinished_block:
                raise self._altered("bin")
            for file, size in sizes.items():
                file.truncate(size)
                file.seek(size)
        else:
            for file in sizes:
                file.truncate(0)
            self._write_starts(np.zeros(1, "<i8"))
        self._idx.seek(0)
        self._idx.write(bytes(HEADER.size))  # zeros are no header: not an index until the very end
        self._idx.seek(sizes[self._idx])

    def _as_stored(self, tokens: NDArray[Any]) -> memoryview:
        """Return the bytes of ``tokens`` in the dataset's type; refuse ids that the type cannot hold."""
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
        return as_bytes(np.ascontiguousarray(tokens, dtype=self.dtype))

    def _complete_index(self) -> None:
        """Append pointers and document starts to the lengths that the index has already, and write its header."""
        self._idx.flush()
        with open(temporary_path(idx_path(self.prefix)), "rb") as written:
            written.seek(HEADER.size)
            pointer = checksum = 0
            for first in range(0, self.sequences, INDEX_ROWS):
                rows = min(INDEX_ROWS, self.sequences - first)
                content = written.read(4 * rows)
                checksum = zlib.crc32(content, checksum)
                sizes = np.frombuffer(content, "<i4").astype("<i8") * self.dtype.itemsize
                ends = pointer + np.cumsum(sizes)
                self._idx.write((ends - sizes).astype("<i8").tobytes())
                pointer = int(ends[-1])
        if self._lengths_checksum not in (None, checksum) or pointer != self.tokens * self.dtype.itemsize:
            raise self._altered("idx")
        self._starts.seek(0)
        checksum = 0
        while block := self._starts.read(WRITE_BUFFER):
            checksum = zlib.crc32(block, checksum)
            self._idx.write(block)
        if self._starts_checksum not in (None, checksum):
            raise self._altered("starts")
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, self._code, self.sequences, self.documents + 1))

    def _altered(self, name: str) -> UserError:
        problem = "was altered since an earlier run wrote it: it does not fit the journal beside it"
        return UserError(self._temporary[name], problem, START_AFRESH)


def _continued(checksum: int | None, content: bytes) -> int | None:
    """Return the CRC-32 of what has ``checksum`` and then ``content``; None where the first is not known."""
    return None if checksum is None else zlib.crc32(content, checksum)


def open_locked(path: Path) -> BinaryIO:
    """Open ``path`` for reading and writing, keep its content, and lock it against other processes that do so.

    A process that waited while the other one finished may have opened a file that has since been renamed. It then opens
    ``path`` again, or it would write into a finished dataset.

    Raises:
        UserError: another process has the file open this way.
        OSError: the path is a link, or something else than a regular file.
    """
    while True:
        if path.exists():
            check_regular(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        file = open(descriptor, "r+b", buffering=WRITE_BUFFER)  # noqa: SIM115
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
