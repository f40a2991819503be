"""Define the chunks of whole documents that a corpus is read in, the documents in them, and how they are found.

An *invalid document* is one that cannot be used; whether it is skipped or ends the run is the user's choice
(``InvalidDocumentLog``).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from megachiar.errors import UserError

TxtDocuments = Literal["file", "line", "blank-line"]
OnError = Literal["skip", "refuse", "replace"]
InvalidDocumentKind = Literal[
    "broken_json",
    "not_an_object",
    "bad_row",
    "missing_text",
    "not_a_string",
    "invalid_utf8",
    "empty",
    "control_token",
    "missing_label",
    "bad_label",
    "unknown_class",
    "bad_tokens",
    "bad_image",
]

EXAMPLES_PER_KIND = 3


@dataclass(frozen=True)
class ReadOptions:
    """Say how documents are found in the sources.

    Attributes:
        text_key: the key or column that holds the text; ``a.b`` is the key ``b`` of the object under ``a``.
        txt_documents: the unit that is a document in a text file: the whole ``file``, each ``line``, or each paragraph
            between blank lines (``blank-line``).
        max_document_bytes: the largest document allowed. Memory holds several copies of a document, so a larger one
            ends the run.
        chunk_bytes: the size of a complete chunk, in bytes of text.
        more_text_keys: keys of further texts, which are joined to the first one by an empty line.
        replace_bad_bytes: whether bytes that are not UTF-8 become U+FFFD instead of an invalid document.
        second_text_key: the JSON key or column of a second text of each document; None where there is one text.
        token_key: the JSON key or column that holds ready-made token ids in place of text; None for text.
        label_key: the JSON key or column that holds the label of each document; None for documents without labels.
    """

    text_key: str = "text"
    txt_documents: TxtDocuments = "file"
    max_document_bytes: int = 64 << 20
    chunk_bytes: int = 512 << 10
    second_text_key: str | None = None
    token_key: str | None = None
    label_key: str | None = None
    more_text_keys: tuple[str, ...] = ()
    replace_bad_bytes: bool = False

    @functools.cached_property
    def content_keys(self) -> tuple[str, ...]:
        """Return the keys of what becomes tokens: one or two texts, or ids."""
        if self.token_key is not None:
            return (self.token_key,)
        return self.text_keys if self.second_text_key is None else (*self.text_keys, self.second_text_key)

    @functools.cached_property
    def text_keys(self) -> tuple[str, ...]:
        """Return the keys of the text, or of the texts that are joined into one."""
        return (self.text_key, *self.more_text_keys)

    @functools.cached_property
    def keys(self) -> tuple[str, ...]:
        """Return all keys that are read of a record, each once."""
        return tuple(dict.fromkeys([*self.content_keys, *self.extra_keys.values()]))

    @functools.cached_property
    def is_one_text(self) -> bool:
        """Return whether a document is the text under one key and nothing else."""
        return not self.extra_keys and not self.more_text_keys

    @functools.cached_property
    def extra_keys(self) -> dict[str, str]:
        """Return the names and values of the keys that a document of one text without a label does not have."""
        keys = {"second_text_key": self.second_text_key, "token_key": self.token_key, "label_key": self.label_key}
        return {name: key for name, key in keys.items() if key is not None}


class Chunk(NamedTuple):
    """Hold whole documents that are not parsed yet.

    Attributes:
        source: the name of the input.
        layout: how the documents are separated: ``jsonl``, ``line`` and ``blank-line`` documents are all in ``data``;
            with ``documents`` each is an entry of ``rows``, with ``elements`` too, as JSON, and with ``records`` it is
            an entry of ``records``.
        data: the bytes of the documents; empty with the other layouts.
        first: the number of the first line, or of the first document, counted from 1.
        offset: where ``data`` begins in the (decompressed) source, in bytes.
        consumed: the bytes that were read from the disk for this chunk.
        compressed: whether the source is compressed, so that offsets count bytes of the decompressed text.
        rows: the bytes of each document; None where a parquet row is null.
        records: the values of each document by column, with texts as bytes; or why it cannot be used.
        places: the line and the byte in the source of each entry of ``rows`` or ``records``; empty where they are not
            known, as of columns.
    """

    source: str
    layout: Literal["jsonl", "line", "blank-line", "documents", "elements", "records"]
    data: bytes = b""
    first: int = 1
    offset: int = 0
    consumed: int = 0
    compressed: bool = False
    rows: Sequence[bytes | None] = ()
    records: Sequence[Mapping[str, Any] | InvalidDocument] = ()
    places: Sequence[tuple[int, int]] = ()

    @property
    def size(self) -> int:
        """Return the bytes of text, or about the bytes of ids."""
        records = sum(size_of_values(record) for record in self.records if isinstance(record, Mapping))
        return len(self.data) + sum(len(row or b"") for row in self.rows) + records


def size_of_values(record: Mapping[str, Any]) -> int:
    """Return the bytes of the texts of a record, and 4 for each entry of its lists."""
    texts = sum(len(value) for value in record.values() if isinstance(value, bytes))
    return texts + 4 * sum(len(value) for value in record.values() if isinstance(value, list))


class Document(NamedTuple):
    """Hold a usable document.

    Attributes:
        text: its text; two texts are joined by a line end.
        utf8: the same as UTF-8. Of ready-made ids, which have no text, both are empty.
        where: where it is, for a message.
        texts: the two texts of a document that has two; empty for one text.
        tokens: its ready-made ids; None for text.
        label: the label as it was read, text or a whole number; None without labels.
        replaced: whether bytes that are not UTF-8 were replaced in the text.
    """

    text: str
    utf8: bytes
    where: str = ""
    texts: tuple[str, ...] = ()
    tokens: Sequence[int] | None = None
    label: str | int | None = None
    replaced: bool = False


class InvalidDocument(NamedTuple):
    """Describe a document that cannot be used: the kind of its problem, its location, and the problem in words."""

    kind: InvalidDocumentKind
    where: str
    problem: str


@dataclass
class InvalidDocumentLog:
    """Count invalid documents by kind and keep the first few of each, or refuse the first one.

    Attributes:
        on_error: ``refuse`` raises at the first invalid document, ``skip`` goes on, and so does ``replace``, with which
            text of other bytes than UTF-8 is no invalid document.
        counts: kind -> number of documents.
        examples: the first EXAMPLES_PER_KIND documents of each kind.
        replaced: the number of documents in which bytes that are not UTF-8 were replaced.
    """

    on_error: OnError = "refuse"
    counts: Counter[str] = field(default_factory=Counter)
    examples: list[InvalidDocument] = field(default_factory=list)
    replaced: int = 0

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
        self.replaced += later.replaced
