"""Parse the documents out of chunks: UTF-8, JSON, lines and paragraphs."""

from __future__ import annotations

import json
from collections.abc import Iterator

from megachiar.data.inputs.documents import Chunk, Document, InvalidDocument, ReadOptions
from megachiar.data.inputs.records import json_type, parse_record

DEFAULT = ReadOptions()
REPLACEMENT = "\ufffd"  # stands for bytes that are not UTF-8


def parse_chunk(chunk: Chunk, options: ReadOptions = DEFAULT) -> Iterator[Document | InvalidDocument]:
    """Yield the documents of ``chunk``, valid and invalid, in order.

    Blank lines in jsonl are not documents. In text they separate documents; where each line is a document, they are
    empty documents.
    """
    if chunk.layout == "jsonl":
        for number, offset, line in _lines(chunk):
            if line.strip():
                yield _parse_json(chunk, _at_line(chunk, number), offset, line, options)
    elif chunk.layout == "line":
        for number, offset, line in _lines(chunk):
            yield _decode(_at_line(chunk, number), chunk, offset, line.removesuffix(b"\r"), options)
    elif chunk.layout == "blank-line":
        for number, offset, paragraph in _paragraphs(chunk):
            yield _decode(_at_line(chunk, number), chunk, offset, paragraph, options)
    elif chunk.layout == "records":
        for index, record in enumerate(chunk.records):
            if isinstance(record, InvalidDocument):
                yield record
            else:
                yield parse_record(_at_record(chunk, index), record, options)
    elif chunk.layout == "elements":
        for number, ((_, offset), element) in enumerate(zip(chunk.places, chunk.rows, strict=True), chunk.first):
            yield _parse_json(chunk, f"{chunk.source}: element {number}", offset, element or b"", options)
    else:
        for number, data in enumerate(chunk.rows, chunk.first):
            yield _parse_row(chunk, number, data, options)


def _lines(chunk: Chunk) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset in the source, and content without its line end of each line."""
    lines = chunk.data.split(b"\n")
    if not lines[-1]:
        lines.pop()  # the rest after the last line end is no line
    offset = chunk.offset
    for number, line in enumerate(lines, chunk.first):
        yield number, offset, line
        offset += len(line) + 1


def _paragraphs(chunk: Chunk) -> Iterator[tuple[int, int, bytes]]:
    """Yield number of the first line, offset in the source, and text of each run of lines that are not blank."""
    run: list[bytes] = []
    start, start_offset = 0, 0
    for number, offset, line in _lines(chunk):
        if line.strip():
            if not run:
                start, start_offset = number, offset
            run.append(line.removesuffix(b"\r"))
        elif run:
            yield start, start_offset, b"\n".join(run)
            run = []
    if run:
        yield start, start_offset, b"\n".join(run)


def _parse_json(
    chunk: Chunk, location: str, offset: int, line: bytes, options: ReadOptions
) -> Document | InvalidDocument:
    """Parse a line of JSON lines, or an element of an array."""
    replaced = False
    try:
        decoded = line.decode()
    except UnicodeDecodeError as error:
        if not options.replace_bad_bytes:
            return _invalid_utf8(location, chunk, offset, line, error)
        decoded, replaced = line.decode(errors="replace"), True
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        byte = offset + len(decoded[: error.pos].encode())
        return InvalidDocument("broken_json", _at_byte(location, chunk, byte), f"broken JSON: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        return InvalidDocument("broken_json", _at_byte(location, chunk, offset), f"cannot parse JSON: {error}")
    where = _at_byte(location, chunk, offset)
    if not isinstance(record, dict):
        return InvalidDocument("not_an_object", where, f"is a JSON {json_type(record)} where an object is expected")
    document = parse_record(where, record, options)
    if replaced and isinstance(document, Document) and REPLACEMENT in document.text:
        return document._replace(replaced=True)
    return document


def _parse_row(chunk: Chunk, number: int, data: bytes | None, options: ReadOptions) -> Document | InvalidDocument:
    """Parse an entry of ``rows``."""
    many = len(chunk.rows) > 1 or chunk.first > 1
    location = f"{chunk.source}: document {number}" if many else chunk.source
    if data is None:
        return InvalidDocument("not_a_string", location, "the text is null")
    return _decode(location, chunk, chunk.offset, data, options)


def _decode(location: str, chunk: Chunk, offset: int, data: bytes, options: ReadOptions) -> Document | InvalidDocument:
    """Decode the bytes of a document."""
    replaced = False
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if not options.replace_bad_bytes:
            return _invalid_utf8(location, chunk, offset, data, error)
        text, replaced = data.decode(errors="replace"), True
        data = text.encode()
    if not text.strip():
        return InvalidDocument("empty", _at_byte(location, chunk, offset), "is empty")
    return Document(text, data, location, replaced=replaced)


def _invalid_utf8(location: str, chunk: Chunk, offset: int, data: bytes, error: UnicodeDecodeError) -> InvalidDocument:
    byte = data[error.start]
    return InvalidDocument(
        "invalid_utf8", _at_byte(location, chunk, offset + error.start), f"byte 0x{byte:02x} is not valid UTF-8"
    )


def _at_line(chunk: Chunk, line: int) -> str:
    """Return text such as ``a.jsonl:12``."""
    return f"{chunk.source}:{line}"


def _at_record(chunk: Chunk, index: int) -> str:
    """Return text such as ``a.csv:12 (byte 345)``, or the number of a document where its place is not known."""
    if not chunk.places:
        return f"{chunk.source}: document {chunk.first + index}"
    line, byte = chunk.places[index]
    return _at_byte(_at_line(chunk, line), chunk, byte)


def _at_byte(location: str, chunk: Chunk, byte: int) -> str:
    """Return text such as ``a.jsonl:12 (byte 345)``."""
    return f"{location} (byte {byte}{' of the decompressed text' if chunk.compressed else ''})"
