"""Read the rows of comma-separated values (RFC 4180) as Python's ``csv`` reads them, strictly.

The first row names the columns. A field may hold commas and line ends between quotes, so that rows are found here, in
one process. Bytes are decoded as Latin-1, which has a character for each byte, and fields go on as bytes. Whether they
are UTF-8 is reported by row, as in all other formats.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megachiar.data.inputs.documents import Chunk, InvalidDocument, ReadOptions, size_of_values
from megachiar.data.inputs.source import Source
from megachiar.data.inputs.text_errors import too_large
from megachiar.errors import UserError


def csv_chunks(
    source: Source, offset: int, blocks: Iterator[tuple[bytes, int]], options: ReadOptions
) -> Iterator[Chunk]:
    """Yield the rows in chunks of the layout ``records``.

    Args:
        source: the source that is read.
        offset: where the text begins in it, in bytes.
        blocks: blocks of the text, each with the bytes that were read from the disk for it.
        options: which columns hold what, and how large chunks and documents may be.

    Raises:
        UserError: a column is missing, the quotes of a row are broken, or a document is too large.
    """
    table = _Table(source, offset, blocks, options)
    records: list[Mapping[str, Any] | InvalidDocument] = []
    places: list[tuple[int, int]] = []
    first, size = 1, 0

    def chunk() -> Chunk:
        consumed, is_compressed = table.lines.take_consumed(), bool(source.compression)
        return Chunk(source.name, "records", b"", first, 0, consumed, is_compressed, records=records, places=places)

    for place, record in table.records():
        records.append(record)
        places.append(place)
        size += size_of_values(record) if isinstance(record, Mapping) else 0
        if size >= options.chunk_bytes or len(records) >= options.chunk_bytes >> 4:
            yield chunk()
            first, records, places, size = first + len(records), [], [], 0
    yield chunk()


class _Table:
    """Read a table row by row; the arguments are those of ``csv_chunks``.

    Attributes:
        lines: its lines.
    """

    def __init__(self, source: Source, offset: int, blocks: Iterator[tuple[bytes, int]], options: ReadOptions):
        csv.field_size_limit(options.max_document_bytes)  # of the whole process, which has no other use for it
        self.lines = _Lines(source, offset, blocks, options)
        self._source, self._options = source, options
        self._rows = csv.reader(self.lines, strict=True)

    def records(self) -> Iterator[tuple[tuple[int, int], Mapping[str, Any] | InvalidDocument]]:
        """Yield line and byte of each row after the first, and its values by column or why it cannot be used."""
        header = next(self._fields(), None)
        if header is None:
            return
        names = [name.decode(errors="backslashreplace").strip() for name in header[1]]
        columns = {key: self._place_of(key, names) for key in self._options.keys}
        for place, fields in self._fields():
            if len(fields) != len(names):
                problem = f"has {len(fields)} fields, but the first row names {len(names)} columns"
                yield place, InvalidDocument("bad_row", self._where(*place), problem)
                continue
            record = {key: fields[column] for key, column in columns.items()}
            if (taken := size_of_values(record)) > self._options.max_document_bytes:
                raise too_large(self._source, f"row at line {place[0]}", taken, self._options, "split it, or ")
            yield place, record

    def _fields(self) -> Iterator[tuple[tuple[int, int], list[bytes]]]:
        """Yield line and byte of each row, and its fields; blank lines are no rows."""
        while True:
            place = (self._rows.line_num + 1, self.lines.offset)
            try:
                row = next(self._rows, None)
            except csv.Error as error:
                problem = (
                    "a quote that opens in this row is never closed" if "end of data" in str(error) else str(error)
                )
                remedy = 'write a quote inside a field as "", and the whole field between quotes'
                raise UserError(self._where(*place), f"broken CSV: {problem}", remedy) from error
            if row is None:
                return
            if row:
                yield place, [field.encode("latin-1") for field in row]

    def _place_of(self, key: str, names: Sequence[str]) -> int:
        """Return the place of a column.

        Raises:
            UserError: no column has this name, or two have it.
        """
        if names.count(key) == 1:
            return names.index(key)
        shown = ", ".join(names)
        problem = f"has two columns {key!r}" if key in names else f"has no column {key!r}, only {shown:.200}"
        keys = (
            {**self._options.extra_keys, "text_key": key}
            if key in self._options.text_keys
            else self._options.extra_keys
        )
        option = next(f"--{name.replace('_', '-')}" for name, value in reversed(keys.items()) if value == key)
        raise UserError(self._source.name, problem, f"name the column with {option}; the first row names the columns")

    def _where(self, line: int, byte: int) -> str:
        of_text = " of the decompressed text" if self._source.compression else ""
        return f"{self._source.name}:{line} (byte {byte}{of_text})"


class _Lines:
    """Iterate over the lines of a text with their line ends, as Latin-1.

    Attributes:
        offset: where the next line begins in the source, in bytes.
    """

    def __init__(self, source: Source, offset: int, blocks: Iterator[tuple[bytes, int]], options: ReadOptions):
        self._source, self._blocks, self._options = source, blocks, options
        self.offset = offset
        self._consumed = 0
        self._lines = self._read()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.offset += len(line)
        return line.decode("latin-1")

    def take_consumed(self) -> int:
        """Return the bytes that were read from the disk since the last call."""
        consumed, self._consumed = self._consumed, 0
        return consumed

    def _read(self) -> Iterator[bytes]:
        rest = b""
        for block, consumed in self._blocks:
            self._consumed += consumed
            lines = (rest + block).splitlines(keepends=True)
            rest = b"" if not lines or lines[-1].endswith(b"\n") else lines.pop()  # after \r there may follow \n
            yield from lines
            if len(rest) > self._options.max_document_bytes:
                raise too_large(self._source, f"line at byte {self.offset}", len(rest), self._options, "split it, or ")
        if rest:
            yield rest
