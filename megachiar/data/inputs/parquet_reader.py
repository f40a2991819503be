"""Read the rows of a parquet file, of its text column or of several columns, a few at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megachiar.data.inputs import remote
from megachiar.data.inputs.columns import ROWS_AT_ONCE, Batch, check_columns, chunks_of_batches
from megachiar.data.inputs.compression import READ_BYTES, OnContent, gather, raw_blocks
from megachiar.data.inputs.documents import Chunk, ReadOptions
from megachiar.data.inputs.recognition import HEAD_BYTES, describe, refuse_pointer
from megachiar.data.inputs.source import Source
from megachiar.data.storage.regular_file import check_regular
from megachiar.errors import UserError


def parquet_chunks(source: Source, options: ReadOptions, on_content: OnContent | None = None) -> Iterator[Chunk]:
    """Yield the chunks of a parquet file, whose documents are its rows.

    Args:
        source: the file to read.
        options: how documents are found in it.
        on_content: called with the length and the bytes of each row of the columns that are read, for a checksum; null
            rows are included.

    Raises:
        UserError: the file is no whole parquet file, has no such column, or holds a document that is too large.
    """
    import pyarrow
    from pyarrow import parquet

    if source.path is not None:
        check_regular(source.path)
    try:
        with (
            contextlib.nullcontext(source.path) if source.url is None else remote.open_to_read(source.url) as opened,
            parquet.ParquetFile(opened, buffer_size=READ_BYTES, page_checksum_verification=True) as file,
        ):
            check_columns(source, file.schema_arrow, options)
            yield from chunks_of_batches(source, _batches(source, file, options), options, on_content)
    except pyarrow.ArrowException as error:
        head, _ = gather(raw_blocks(source), HEAD_BYTES)
        refuse_pointer(source.name, head)
        if (what := describe(head)) not in (None, "a parquet file"):
            remedy = "give it the suffix it deserves"
            raise UserError(source.name, f"is not a parquet file, but {what}", remedy) from error
        raise UserError(source.name, f"is not a whole parquet file: {error}", "fetch or write it again") from error


def _batches(source: Source, file: Any, options: ReadOptions) -> Iterator[Batch]:
    """Yield the rows of the columns that are read."""
    share = (source.size or 0) / max(1, file.metadata.num_rows)  # bytes on disk per row, for the progress display
    for rows in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=list(options.keys), use_threads=False):
        yield Batch(rows, share * rows.num_rows)
