"""Read the rows of one column of a parquet file, a few at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from megachiar.data.inputs import remote
from megachiar.data.inputs.compression import READ_BYTES, OnContent, gather, raw_blocks
from megachiar.data.inputs.documents import Chunk, ReadOptions
from megachiar.data.inputs.recognition import HEAD_BYTES, describe, refuse_pointer
from megachiar.data.inputs.source import Source
from megachiar.data.inputs.text_reader import too_large
from megachiar.data.storage.regular_file import check_regular
from megachiar.errors import UserError

PARQUET_ROWS = 256  # decoded at once
TEXT_COLUMNS = {"string", "large_string", "string_view", "binary", "large_binary"}  # types of parquet columns


def parquet_chunks(source: Source, options: ReadOptions, on_content: OnContent | None = None) -> Iterator[Chunk]:
    """Yield the chunks of a parquet file, whose documents are the rows of its text column.

    Args:
        source: the file to read.
        options: how documents are found in it.
        on_content: called with the length and the bytes of each row of the column, for a checksum; null rows are
            included.

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
            _check_column(source, file.schema_arrow, options.text_key)
            yield from _row_chunks(source, file, options, on_content)
    except pyarrow.ArrowException as error:
        head, _ = gather(raw_blocks(source), HEAD_BYTES)
        refuse_pointer(source.name, head)
        if (what := describe(head)) not in (None, "a parquet file"):
            remedy = "give it the suffix it deserves"
            raise UserError(source.name, f"is not a parquet file, but {what}", remedy) from error
        raise UserError(source.name, f"is not a whole parquet file: {error}", "fetch or write it again") from error


def _check_column(source: Source, schema: Any, text_key: str) -> None:
    """Refuse a parquet file whose text column is missing or holds no text."""
    from pyarrow import types

    if text_key not in schema.names:
        raise UserError(
            source.name,
            f"has no column {text_key!r}, only {', '.join(schema.names)}",
            "name the column with --text-key",
        )
    kind = schema.field(text_key).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if str(kind) not in TEXT_COLUMNS:
        raise UserError(source.name, f"column {text_key!r} holds {kind}, not text", "name the column with --text-key")


def _row_chunks(source: Source, file: Any, options: ReadOptions, on_content: OnContent | None) -> Iterator[Chunk]:
    """Yield the rows of the text column in chunks."""
    rows: list[bytes | None] = []
    first, size = 1, 0
    share = (source.size or 0) / max(1, file.metadata.num_rows)  # bytes on disk per row, for the progress display
    for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[options.text_key], use_threads=False):
        for row in _as_bytes(batch.column(0)):
            if row is not None and len(row) > options.max_document_bytes:
                raise too_large(source, f"document {first + len(rows)}", len(row), options, "split it, or ")
            if on_content is not None:
                on_content(b"null" if row is None else b"%d:" % len(row))
                on_content(row or b"")
            rows.append(row)
            size += len(row or b"")
            if size >= options.chunk_bytes:
                yield Chunk(source.name, "documents", first=first, consumed=round(share * len(rows)), rows=rows)
                rows, first, size = [], first + len(rows), 0
    if rows:
        yield Chunk(source.name, "documents", first=first, consumed=round(share * len(rows)), rows=rows)


def _as_bytes(column: Any) -> list[bytes | None]:
    """Return the rows as bytes; their UTF-8 is checked later, as for all other formats, and reported by row."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()
