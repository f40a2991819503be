"""Define the chunks of whole documents that a corpus is read in, and parse the documents out of them.

An *invalid document* is one that cannot be used; whether it is skipped or ends the run is the user's choice
(``InvalidDocumentLog``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from megachiar.errors import UserError

TxtDocuments = Literal["file", "line", "blank-line"]
OnError = Literal["skip", "refuse"]
InvalidDocumentKind = Literal[
    "broken_json", "not_an_object", "missing_text", "not_a_string", "invalid_utf8", "empty", "control_token"
]

EXAMPLES_PER_KIND = 3
MOST_KEYS = 8  # of a record that a message names


@dataclass(frozen=True)
class ReadOptions:
    """Say how documents are found in the sources.

    Attributes:
        text_key: the JSON key or parquet column that holds the text.
        txt_documents: the unit that is a document in a text file: the whole ``file``, each ``line``, or each paragraph
            between blank lines (``blank-line``).
        max_document_bytes: the largest document allowed. Memory holds several copies of a document, so a larger one
            ends the run.
        chunk_bytes: the size of a complete chunk, in bytes of text.
    """

    text_key: str = "text"
    txt_documents: TxtDocuments = "file"
    max_document_bytes: int = 64 << 20
    chunk_bytes: int = 512 << 10


class Chunk(NamedTuple):
    """Hold whole documents that are not parsed yet.

    Attributes:
        source: the name of the input.
        layout: how the documents are separated: ``jsonl``, ``line`` and ``blank-line`` documents are all in ``data``;
            with ``documents`` each is an entry of ``rows``.
        data: the bytes of the documents; empty with the layout ``documents``.
        first: the number of the first line, or of the first document, counted from 1.
        offset: where ``data`` begins in the (decompressed) source, in bytes.
        consumed: the bytes that were read from the disk for this chunk.
        compressed: whether the source is compressed, so that offsets count bytes of the decompressed text.
        rows: the bytes of each document; None where a parquet row is null.
    """

    source: str
    layout: Literal["jsonl", "line", "blank-line", "documents"]
    data: bytes = b""
    first: int = 1
    offset: int = 0
    consumed: int = 0
    compressed: bool = False
    rows: Sequence[bytes | None] = ()

    @property
    def size(self) -> int:
        """Return the bytes of text."""
        return len(self.data) + sum(len(row or b"") for row in self.rows)


class Document(NamedTuple):
    """Hold a usable document: its text, the same as UTF-8, and where it is, for a message."""

    text: str
    utf8: bytes
    where: str = ""


class InvalidDocument(NamedTuple):
    """Describe a document that cannot be used: the kind of its problem, its location, and the problem in words."""

    kind: InvalidDocumentKind
    where: str
    problem: str


@dataclass
class InvalidDocumentLog:
    """Count invalid documents by kind and keep the first few of each, or refuse the first one.

    Attributes:
        on_error: ``refuse`` raises at the first invalid document, ``skip`` goes on.
        counts: kind -> number of documents.
        examples: the first EXAMPLES_PER_KIND documents of each kind.
    """

    on_error: OnError = "refuse"
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[InvalidDocument] = field(default_factory=list)

    def add(self, invalid: InvalidDocument) -> None:
        """Record one invalid document.

        Raises:
            UserError: ``on_error`` is ``refuse``.
        """
        if self.on_error == "refuse":
            raise UserError(
                invalid.where,
                f"{invalid.problem} [{invalid.kind}]",
                "mend the input, or pass --on-error skip to leave such documents out and have them counted",
            )
        if self.counts[invalid.kind] < EXAMPLES_PER_KIND:
            self.examples.append(invalid)
        self.counts[invalid.kind] += 1

    def merge(self, later: InvalidDocumentLog) -> None:
        """Add the log of a later part of the input."""
        for invalid in later.examples:
            if sum(known.kind == invalid.kind for known in self.examples) < EXAMPLES_PER_KIND:
                self.examples.append(invalid)
        self.counts.update(later.counts)


def parse_chunk(chunk: Chunk, text_key: str = "text") -> Iterator[Document | InvalidDocument]:
    """Yield the documents of ``chunk``, valid and invalid, in order.

    Blank lines in jsonl are not documents. In text they separate documents; where each line is a document, they are
    empty documents.
    """
    if chunk.layout == "jsonl":
        for number, offset, line in _lines(chunk):
            if line.strip():
                yield _parse_json(chunk, number, offset, line, text_key)
    elif chunk.layout == "line":
        for number, offset, line in _lines(chunk):
            yield _decode(_at_line(chunk, number), chunk, offset, line.removesuffix(b"\r"))
    elif chunk.layout == "blank-line":
        for number, offset, paragraph in _paragraphs(chunk):
            yield _decode(_at_line(chunk, number), chunk, offset, paragraph)
    else:
        for number, data in enumerate(chunk.rows, chunk.first):
            yield _parse_row(chunk, number, data)


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


def _parse_json(chunk: Chunk, number: int, offset: int, line: bytes, text_key: str) -> Document | InvalidDocument:
    """Parse a line of JSON lines."""
    try:
        decoded = line.decode()
    except UnicodeDecodeError as error:
        return _invalid_utf8(_at_line(chunk, number), chunk, offset, line, error)
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        byte = offset + len(decoded[: error.pos].encode())
        return InvalidDocument(
            "broken_json", _at_byte(_at_line(chunk, number), chunk, byte), f"broken JSON: {error.msg}"
        )
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        return InvalidDocument(
            "broken_json", _at_byte(_at_line(chunk, number), chunk, offset), f"cannot parse JSON: {error}"
        )
    where = _at_byte(_at_line(chunk, number), chunk, offset)
    if not isinstance(record, dict):
        return InvalidDocument("not_an_object", where, f"is a JSON {_json_type(record)} where an object is expected")
    if text_key not in record:
        keys = ", ".join(list(record)[:MOST_KEYS]).encode(errors="backslashreplace").decode() or "none at all"
        return InvalidDocument("missing_text", where, f"has no key {text_key!r}; keys are {keys}")
    text = record[text_key]
    if not isinstance(text, str):
        return InvalidDocument("not_a_string", where, f"{text_key!r} is a JSON {_json_type(text)}, not a string")
    return _usable(where, text)


def _parse_row(chunk: Chunk, number: int, data: bytes | None) -> Document | InvalidDocument:
    """Parse an entry of ``rows``."""
    many = len(chunk.rows) > 1 or chunk.first > 1
    location = f"{chunk.source}: document {number}" if many else chunk.source
    if data is None:
        return InvalidDocument("not_a_string", location, "the text is null")
    return _decode(location, chunk, chunk.offset, data)


def _decode(location: str, chunk: Chunk, offset: int, data: bytes) -> Document | InvalidDocument:
    """Decode the bytes of a document."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return _invalid_utf8(location, chunk, offset, data, error)
    if not text.strip():
        return InvalidDocument("empty", _at_byte(location, chunk, offset), "is empty")
    return Document(text, data, location)


def _usable(where: str, text: str) -> Document | InvalidDocument:
    """Check the text of a document from JSON, which may hold characters that UTF-8 cannot encode."""
    if not text.strip():
        return InvalidDocument("empty", where, "is empty")
    try:
        return Document(text, text.encode(), where)
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return InvalidDocument(
            "invalid_utf8", where, f"character {error.start} is half of a surrogate pair (\\u{code:04x})"
        )


def _invalid_utf8(location: str, chunk: Chunk, offset: int, data: bytes, error: UnicodeDecodeError) -> InvalidDocument:
    byte = data[error.start]
    return InvalidDocument(
        "invalid_utf8", _at_byte(location, chunk, offset + error.start), f"byte 0x{byte:02x} is not valid UTF-8"
    )


def _at_line(chunk: Chunk, line: int) -> str:
    """Return text such as ``a.jsonl:12``."""
    return f"{chunk.source}:{line}"


def _at_byte(location: str, chunk: Chunk, byte: int) -> str:
    """Return text such as ``a.jsonl:12 (byte 345)``."""
    return f"{location} (byte {byte}{' of the decompressed text' if chunk.compressed else ''})"


def _json_type(value: Any) -> str:
    """Return JSON's word for the type of ``value``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "string", dict: "object", list: "array", int: "number", float: "number"}
    return names[type(value)]
