"""What is read of a corpus: chunks of whole documents, the documents in them, and those that cannot be used.

An *invalid document* is one that cannot be used; whether it is skipped or ends the run is the user's choice
(``InvalidDocumentLog``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from megachiar.errors import UserError

TxtDocuments = Literal["file", "line", "blank-line"]
OnError = Literal["skip", "refuse"]
InvalidDocumentKind = Literal[
    "broken_json", "not_an_object", "missing_text", "not_a_string", "invalid_utf8", "empty", "control_token"
]

EXAMPLES_PER_KIND = 3


@dataclass(frozen=True)
class ReadOptions:
    """How documents are found in the sources.

    Attributes:
        text_key: the JSON key or parquet column that holds the text.
        txt_documents: what a document is in a text file: the whole ``file``, a ``line``, or what stands between
            ``blank-line``s.
        max_document_bytes: a document larger than this ends the run; it would be in memory several times.
        chunk_bytes: text that one chunk aims at.
    """

    text_key: str = "text"
    txt_documents: TxtDocuments = "file"
    max_document_bytes: int = 64 << 20
    chunk_bytes: int = 512 << 10


class Chunk(NamedTuple):
    """Whole documents, not parsed yet.

    Attributes:
        source: name of the input.
        layout: how documents lie in ``data``: ``jsonl``, ``line`` and ``blank-line`` are one run of bytes;
            ``documents`` is one entry per document, None where a parquet row is null.
        data: the bytes.
        first: number of the first line, or of the first document, counted from 1.
        offset: where ``data`` begins in the (decompressed) source, in bytes.
        consumed: bytes of the input as it lies on the disk that were read for this chunk.
        compressed: offsets count bytes of the decompressed text.
    """

    source: str
    layout: Literal["jsonl", "line", "blank-line", "documents"]
    data: bytes | list[bytes | None]
    first: int = 1
    offset: int = 0
    consumed: int = 0
    compressed: bool = False

    @property
    def size(self) -> int:
        """Bytes of text."""
        return len(self.data) if self.layout != "documents" else sum(len(row or b"") for row in self.data)


class Document(NamedTuple):
    """A usable document: its text, the same as UTF-8, and where it is, for a message."""

    text: str
    utf8: bytes
    where: str = ""


class InvalidDocument(NamedTuple):
    """A document that cannot be used: of which kind, where it is, what is wrong with it."""

    kind: InvalidDocumentKind
    where: str
    problem: str


@dataclass
class InvalidDocumentLog:
    """Counts unusable documents by kind and keeps the first few of each; or refuses the first.

    Attributes:
        on_error: ``refuse`` raises at the first invalid document, ``skip`` goes on.
        counts: kind -> documents.
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
        """Take over what was recorded about a later part of the input."""
        for invalid in later.examples:
            if sum(known.kind == invalid.kind for known in self.examples) < EXAMPLES_PER_KIND:
                self.examples.append(invalid)
        self.counts.update(later.counts)


def parse_chunk(chunk: Chunk, text_key: str = "text") -> Iterator[Document | InvalidDocument]:
    """The documents of ``chunk`` in order, and what cannot be used where it occurs.

    Blank lines in jsonl are no documents; in text they only separate or, line by line, are empty documents.
    """
    if chunk.layout == "jsonl":
        for number, offset, line in _lines(chunk):
            if line.strip():
                yield _parse_json(chunk, number, offset, line, text_key)
    elif chunk.layout == "line":
        for number, offset, line in _lines(chunk):
            yield _decode(_place(chunk, number), chunk, offset, line.removesuffix(b"\r"))
    elif chunk.layout == "blank-line":
        for number, offset, paragraph in _paragraphs(chunk):
            yield _decode(_place(chunk, number), chunk, offset, paragraph)
    else:
        for number, data in enumerate(chunk.data, chunk.first):
            yield _parse_row(chunk, number, data)


def _lines(chunk: Chunk) -> Iterator[tuple[int, int, bytes]]:
    """(line number, offset in the source, line without its end) of each line."""
    lines = chunk.data.split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line end is no line
    offset = chunk.offset
    for number, line in enumerate(lines, chunk.first):
        yield number, offset, line
        offset += len(line) + 1


def _paragraphs(chunk: Chunk) -> Iterator[tuple[int, int, bytes]]:
    """(number of the first line, offset, text) of each run of lines that are not blank."""
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
    try:
        decoded = line.decode()
    except UnicodeDecodeError as error:
        return _invalid_utf8(_place(chunk, number), chunk, offset, line, error)
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        byte = offset + len(decoded[: error.pos].encode())
        return InvalidDocument("broken_json", _at_byte(_place(chunk, number), chunk, byte), f"broken JSON: {error.msg}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        return InvalidDocument(
            "broken_json", _at_byte(_place(chunk, number), chunk, offset), f"cannot parse JSON: {error}"
        )
    where = _at_byte(_place(chunk, number), chunk, offset)
    if not isinstance(record, dict):
        return InvalidDocument("not_an_object", where, f"a JSON {_json_type(record)} where an object is expected")
    if text_key not in record:
        keys = ", ".join(list(record)[:8]) or "none at all"
        return InvalidDocument("missing_text", where, f"has no key {text_key!r}; keys are {keys}")
    text = record[text_key]
    if not isinstance(text, str):
        return InvalidDocument("not_a_string", where, f"{text_key!r} is a JSON {_json_type(text)}, not a string")
    return _usable(where, text)


def _parse_row(chunk: Chunk, number: int, data: bytes | None) -> Document | InvalidDocument:
    many = len(chunk.data) > 1 or chunk.first > 1
    place = f"{chunk.source}: document {number}" if many else chunk.source
    if data is None:
        return InvalidDocument("not_a_string", place, "the text is null")
    return _decode(place, chunk, chunk.offset, data)


def _decode(place: str, chunk: Chunk, offset: int, data: bytes) -> Document | InvalidDocument:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return _invalid_utf8(place, chunk, offset, data, error)
    if not text.strip():
        return InvalidDocument("empty", _at_byte(place, chunk, offset), "is empty")
    return Document(text, data, place)


def _usable(where: str, text: str) -> Document | InvalidDocument:
    """The document ``text``, which came through JSON and may hold what UTF-8 cannot."""
    if not text.strip():
        return InvalidDocument("empty", where, "is empty")
    try:
        return Document(text, text.encode(), where)
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        return InvalidDocument(
            "invalid_utf8", where, f"character {error.start} is half of a surrogate pair (\\u{code:04x})"
        )


def _invalid_utf8(place: str, chunk: Chunk, offset: int, data: bytes, error: UnicodeDecodeError) -> InvalidDocument:
    byte = data[error.start]
    return InvalidDocument(
        "invalid_utf8", _at_byte(place, chunk, offset + error.start), f"byte 0x{byte:02x} is not valid UTF-8"
    )


def _place(chunk: Chunk, line: int) -> str:
    return f"{chunk.source}:{line}"


def _at_byte(place: str, chunk: Chunk, byte: int) -> str:
    return f"{place} (byte {byte}{' of the decompressed text' if chunk.compressed else ''})"


def _json_type(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "string", dict: "object", list: "array", int: "number", float: "number"}
    return names[type(value)]
