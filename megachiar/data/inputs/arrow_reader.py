"""Read the rows of an Arrow file, of its text column or of several columns, a few at a time.

An Arrow file has one of two layouts. A *stream* is what the library ``datasets`` writes: batches of rows, then eight
bytes that mark its end. A *file* (also Feather) begins and ends with ``ARROW1`` and has a table of its batches. Neither
has checksums. So the end is looked for before anything is read, and the offsets of each text are checked before it is
taken out of its batch: the library itself would follow a damaged one out of the file.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from megachiar.data.inputs import remote
from megachiar.data.inputs.columns import Batch, check_columns, chunks_of_batches
from megachiar.data.inputs.compression import OnContent, gather, raw_blocks
from megachiar.data.inputs.documents import Chunk, ReadOptions
from megachiar.data.inputs.recognition import HEAD_BYTES, describe, refuse_pointer
from megachiar.data.inputs.source import Source
from megachiar.data.storage.regular_file import check_regular
from megachiar.errors import UserError

FILE_MAGIC = b"ARROW1"
STREAM_START = b"\xff\xff\xff\xff"  # of each message of a stream
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
FETCH = "fetch or write it again"


def arrow_chunks(source: Source, options: ReadOptions, on_content: OnContent | None = None) -> Iterator[Chunk]:
    """Yield the chunks of an Arrow file, whose documents are its rows.

    Args:
        source: the file to read.
        options: how documents are found in it.
        on_content: called with the length and the bytes of each row of the columns that are read, for a checksum; null
            rows are included.

    Raises:
        UserError: the file is no whole Arrow file, has no such column, or holds a document that is too large.
    """
    import pyarrow

    if source.path is not None:
        check_regular(source.path)
    with open(source.path, "rb") if source.path is not None else remote.open_to_read(source.url or "") as file:
        is_stream = _check_ends(source, file)
        try:
            with contextlib.closing(_Batches(source, file, is_stream)) as batches:
                check_columns(source, batches.schema, options)
                yield from chunks_of_batches(source, batches.read(), options, on_content)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk; the library's own have no number
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(source.name, f"is damaged near byte {file.tell()}: {reason}", FETCH) from error


def _check_ends(source: Source, file: BinaryIO) -> bool:
    """Check that a file begins and ends as Arrow does; return whether it is a stream.

    Raises:
        UserError: it does not.
    """
    head = file.read(len(FILE_MAGIC) + 2)
    size = file.seek(0, io.SEEK_END)
    is_stream = head.startswith(STREAM_START)
    if not is_stream and not head.startswith(FILE_MAGIC):
        first, _ = gather(raw_blocks(source), HEAD_BYTES)
        refuse_pointer(source.name, first)
        what = describe(first) or ("empty" if not first else f"something that begins with {first[:8]!r}")
        raise UserError(source.name, f"is not an Arrow file, but {what}", "give it the suffix it deserves")
    end = STREAM_END if is_stream else FILE_MAGIC
    file.seek(max(0, size - len(end)))
    if file.read() != end:
        raise UserError(source.name, f"is truncated: it ends after {size} bytes without the mark of its end", FETCH)
    file.seek(0)
    return is_stream


class _Batches:
    """Read the batches of an Arrow file one after another.

    Attributes:
        schema: the ``pyarrow.Schema``.

    Args:
        source: the file, for errors.
        file: the same, open at its beginning.
        is_stream: its layout.
    """

    def __init__(self, source: Source, file: BinaryIO, is_stream: bool):
        from pyarrow import ipc

        self._source, self._file, self._is_stream = source, file, is_stream
        self._reader: Any = ipc.open_stream(file) if is_stream else ipc.open_file(file)
        self.schema = self._reader.schema

    def read(self) -> Iterator[Batch]:
        """Yield the batches that hold rows."""
        if not self._is_stream:
            share = (self._source.size or 0) / max(1, self._reader.num_record_batches)
            for number in range(self._reader.num_record_batches):
                yield from self._checked(self._reader.get_batch(number), share)
            return
        position = 0
        for rows in self._reader:
            now = self._file.tell()
            yield from self._checked(rows, now - position)
            position = now
        end, size = self._file.tell(), self._file.seek(0, io.SEEK_END)
        if end < size:
            problem = f"is whole up to byte {end}, but goes on to byte {size}: two streams in one file"
            raise UserError(self._source.name, problem, "give each a file of its own")

    def _checked(self, rows: Any, consumed: float) -> Iterator[Batch]:
        """Yield a batch whose offsets point into it.

        Raises:
            pyarrow.ArrowInvalid: they do not.
        """
        for column in rows.columns:
            _as_binary(column).validate(full=True)
        if rows.num_rows:
            yield Batch(rows, consumed)

    def close(self) -> None:
        """Close the reader."""
        if self._is_stream:
            self._reader.close()


def _as_binary(column: Any) -> Any:
    """Return a column of text as one of bytes: whether they are UTF-8 is reported by row later, and not here."""
    import pyarrow

    views = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    return column.view(views[column.type]) if column.type in views else column
