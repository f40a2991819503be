"""Read the rows of a parquet file, of its text column or of several columns, a few at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from megachiar.data.inputs import remote
from megachiar.data.inputs.compression import READ_BYTES, OnContent, gather, raw_blocks
from megachiar.data.inputs.documents import Chunk, ReadOptions, size_of_values
from megachiar.data.inputs.recognition import HEAD_BYTES, describe, refuse_pointer
from megachiar.data.inputs.source import Source
from megachiar.data.inputs.text_reader import too_large
from megachiar.data.storage.regular_file import check_regular
from megachiar.errors import UserError

PARQUET_ROWS = 256  # decoded at once
TEXT_COLUMNS = {"string", "large_string", "string_view", "binary", "large_binary"}  # types of parquet columns


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
            if options.token_key is None:
                for key, option in zip(options.content_keys, ("--text-key", "--second-text-key"), strict=False):
                    _check_column(source, file.schema_arrow, key, option)
            for name, key in options.extra_keys.items():
                _check_present(source, file.schema_arrow, key, f"--{name.replace('_', '-')}")
            read = _record_chunks if options.extra_keys else _row_chunks
            yield from read(source, file, options, on_content)
    except pyarrow.ArrowException as error:
        head, _ = gather(raw_blocks(source), HEAD_BYTES)
        refuse_pointer(source.name, head)
        if (what := describe(head)) not in (None, "a parquet file"):
            remedy = "give it the suffix it deserves"
            raise UserError(source.name, f"is not a parquet file, but {what}", remedy) from error
        raise UserError(source.name, f"is not a whole parquet file: {error}", "fetch or write it again") from error


def _check_present(source: Source, schema: Any, key: str, option: str) -> None:
    """Refuse a parquet file without a column that ``option`` names."""
    if key not in schema.names:
        problem = f"has no column {key!r}, only {', '.join(schema.names)}"
        raise UserError(source.name, problem, f"name the column with {option}")


def _check_column(source: Source, schema: Any, text_key: str, option: str) -> None:
    """Refuse a parquet file whose text column is missing or holds no text."""
    from pyarrow import types

    _check_present(source, schema, text_key, option)
    kind = schema.field(text_key).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if str(kind) not in TEXT_COLUMNS:
        raise UserError(source.name, f"column {text_key!r} holds {kind}, not text", f"name the column with {option}")


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


def _record_chunks(source: Source, file: Any, options: ReadOptions, on_content: OnContent | None) -> Iterator[Chunk]:
    """Yield the rows in chunks, as records of the columns that ``options`` names."""
    records: list[Mapping[str, Any]] = []
    first, size = 1, 0
    share = (source.size or 0) / max(1, file.metadata.num_rows)
    columns = list(dict.fromkeys([*options.content_keys, *options.extra_keys.values()]))

    def chunk() -> Chunk:
        return Chunk(source.name, "records", first=first, consumed=round(share * len(records)), records=records)

    for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns, use_threads=False):
        values = [_as_values(batch.column(batch.schema.get_field_index(column))) for column in columns]
        for row in zip(*values, strict=True):
            record = dict(zip(columns, row, strict=True))
            if (bytes_of_row := size_of_values(record)) > options.max_document_bytes:
                raise too_large(source, f"document {first + len(records)}", bytes_of_row, options, "split it, or ")
            if on_content is not None:
                content = json.dumps(record, default=_as_hexadecimal).encode()
                on_content(b"%d:" % len(content))
                on_content(content)
            records.append(record)
            size += bytes_of_row
            if size >= options.chunk_bytes:
                yield chunk()
                records, first, size = [], first + len(records), 0
    if records:
        yield chunk()


def _as_hexadecimal(value: Any) -> str:
    """Return a value that JSON cannot represent, for a checksum."""
    return value.hex() if isinstance(value, bytes) else repr(value)


def _as_values(column: Any) -> list[Any]:
    """Return the rows of a column, texts as bytes and all else as Python's own types."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return _as_bytes(column) if str(column.type) in TEXT_COLUMNS else column.to_pylist()


def _as_bytes(column: Any) -> list[bytes | None]:
    """Return the rows as bytes; their UTF-8 is checked later, as for all other formats, and reported by row."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary()).to_pylist()
