"""Turn the rows of columns, which parquet and Arrow files hold, into chunks of documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from megachiar.data.inputs.compression import OnContent
from megachiar.data.inputs.documents import Chunk, ReadOptions, size_of_values
from megachiar.data.inputs.source import Source
from megachiar.data.inputs.text_errors import too_large
from megachiar.errors import UserError

ROWS_AT_ONCE = 256  # that are turned into Python's own objects
TEXT_COLUMNS = {"string", "large_string", "string_view", "binary", "large_binary"}  # types of columns


class Batch(NamedTuple):
    """Hold some rows of a file as a ``pyarrow.RecordBatch``, and the bytes on the disk that they take, about."""

    rows: Any
    consumed: float


def check_columns(source: Source, schema: Any, options: ReadOptions) -> None:
    """Check that a file has the columns that ``options`` names, and text where text is read.

    Args:
        source: the file, for the error.
        schema: its ``pyarrow.Schema``.
        options: which columns hold what.

    Raises:
        UserError: a column is missing or holds something else.
    """
    if options.token_key is None:
        for key in options.text_keys:
            _check_text(source, schema, key, "--text-key")
        if options.second_text_key is not None:
            _check_text(source, schema, options.second_text_key, "--second-text-key")
    for name, key in options.extra_keys.items():
        _type_of(source, schema, key, f"--{name.replace('_', '-')}")


def chunks_of_batches(
    source: Source, batches: Iterable[Batch], options: ReadOptions, on_content: OnContent | None
) -> Iterator[Chunk]:
    """Yield the rows of ``batches`` in chunks: the texts themselves, or records where more than one text is read.

    Args:
        source: the file that is read.
        batches: its rows, in order.
        options: which columns hold what.
        on_content: called with the length and the bytes of each row of the columns that are read, for a checksum; null
            rows are included.

    Raises:
        UserError: a row is larger than ``options.max_document_bytes``.
    """
    entries: list[Any] = []
    first, size, consumed = 1, 0, 0.0
    for batch in batches:
        for begin in range(0, batch.rows.num_rows, ROWS_AT_ONCE):
            rows = batch.rows.slice(begin, ROWS_AT_ONCE)
            share = batch.consumed / batch.rows.num_rows
            for entry in _texts(rows, options.text_key) if options.is_one_text else _records(rows, options.keys):
                taken = _size(entry)
                if taken > options.max_document_bytes:
                    raise too_large(source, f"document {first + len(entries)}", taken, options, "split it, or ")
                if on_content is not None:
                    _tell(entry, on_content)
                entries.append(entry)
                size, consumed = size + taken, consumed + share
                if size >= options.chunk_bytes:
                    yield _chunk(source, first, consumed, entries, options)
                    first, entries, size, consumed = first + len(entries), [], 0, 0.0
    if entries:
        yield _chunk(source, first, consumed, entries, options)


def _chunk(source: Source, first: int, consumed: float, entries: list[Any], options: ReadOptions) -> Chunk:
    """Return a chunk of texts or of records."""
    if options.is_one_text:
        return Chunk(source.name, "documents", first=first, consumed=round(consumed), rows=entries)
    return Chunk(source.name, "records", first=first, consumed=round(consumed), records=entries)


def _size(entry: bytes | Mapping[str, Any] | None) -> int:
    """Return the bytes of a text or of a record's values."""
    return size_of_values(entry) if isinstance(entry, Mapping) else len(entry or b"")


def _tell(entry: bytes | Mapping[str, Any] | None, on_content: OnContent) -> None:
    """Call ``on_content`` with the length and the bytes of a row."""
    if entry is None:
        on_content(b"null")
        on_content(b"")
        return
    content = json.dumps(entry, default=_as_hexadecimal).encode() if isinstance(entry, Mapping) else entry
    on_content(b"%d:" % len(content))
    on_content(content)


def _texts(rows: Any, key: str) -> list[bytes | None]:
    """Return the texts of a column as bytes."""
    return _as_bytes(_column(rows, key))


def _records(rows: Any, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the values of each row by key."""
    values = [_as_values(_column(rows, key)) for key in keys]
    for row in zip(*values, strict=True):
        yield dict(zip(keys, row, strict=True))


def _column(rows: Any, key: str) -> Any:
    """Return the column of a key, or a field of a column of structs for keys joined by dots."""
    from pyarrow import compute

    index = rows.schema.get_field_index(key)
    if index >= 0:
        return rows.column(index)
    name, *path = key.split(".")
    return compute.struct_field(rows.column(rows.schema.get_field_index(name)), path)


def _type_of(source: Source, schema: Any, key: str, option: str) -> Any:
    """Return the type of a column, or of a field of a column of structs.

    Raises:
        UserError: there is none.
    """
    from pyarrow import types

    if key in schema.names:
        return schema.field(key).type
    name, *path = key.split(".")
    kind = schema.field(name).type if path and name in schema.names else None
    for part in path:
        is_there = kind is not None and types.is_struct(kind) and kind.get_field_index(part) >= 0
        kind = kind.field(kind.get_field_index(part)).type if kind is not None and is_there else None
    if kind is None:
        problem = f"has no column {key!r}, only {', '.join(schema.names)}"
        raise UserError(source.name, problem, f"name the column with {option}")
    return kind


def _check_text(source: Source, schema: Any, key: str, option: str) -> None:
    """Refuse a file whose text column is missing or holds no text."""
    from pyarrow import types

    kind = _type_of(source, schema, key, option)
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if str(kind) not in TEXT_COLUMNS:
        raise UserError(source.name, f"column {key!r} holds {kind}, not text", f"name the column with {option}")


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
