"""Make a document of one record, a line of JSON or a row of parquet: its text or texts or ids, and its label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megachiar.data.inputs.documents import Document, InvalidDocument, InvalidDocumentKind, ReadOptions
from megachiar.data.inputs.keys import MISSING, find_value

BETWEEN_TEXTS = "\n\n"  # of several keys that are joined
MOST_KEYS = 8  # of a record that a message names
LARGEST_ID = 2**31 - 1  # that a dataset holds
SHOWN = 40  # characters of a value in a message


def parse_record(where: str, record: Mapping[str, Any], options: ReadOptions) -> Document | InvalidDocument:
    """Return the document of a record, or why it cannot be used.

    Args:
        where: the record's place, for a message.
        record: its values by key; of parquet the texts are bytes.
        options: which keys hold what.
    """
    text = record.get(options.text_key)
    if options.is_one_text and isinstance(text, str) and text.strip():  # nearly every document of a corpus
        try:
            return Document(text, text.encode(), where)
        except UnicodeEncodeError:
            pass  # the reason is found below
    values = {key: find_value(record, key) for key in options.content_keys}
    for key, value in values.items():
        if value is MISSING:
            return InvalidDocument("missing_text", where, f"has no key {key!r}; keys are {_keys_of(record)}")
    if options.token_key is not None:
        document = _of_ids(where, options.token_key, values[options.token_key])
    else:
        document = _of_texts(where, values, options)
    if options.label_key is None or isinstance(document, InvalidDocument):
        return document
    return _with_label(document, record, options.label_key)


def json_type(value: Any) -> str:
    """Return JSON's word for the type of ``value``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    names = {str: "string", dict: "object", list: "array", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def _keys_of(record: Mapping[str, Any]) -> str:
    return ", ".join(list(record)[:MOST_KEYS]).encode(errors="backslashreplace").decode() or "none at all"


def _of_texts(where: str, values: Mapping[str, Any], options: ReadOptions) -> Document | InvalidDocument:
    """Return the document of one text or two; the first one may be joined from those of several keys."""
    texts: list[str] = []
    encoded: list[bytes] = []
    replaced = False
    second = () if options.second_text_key is None else (options.second_text_key,)
    for keys in filter(None, (options.text_keys, second)):
        which = f"{keys[0]!r} " if second else ""
        read = _joined(where, {key: values[key] for key in keys}, which, options)
        if isinstance(read, InvalidDocument):
            return read
        texts.append(read.text)
        encoded.append(read.utf8)
        replaced = replaced or read.replaced
    together = tuple(texts) if len(texts) > 1 else ()
    return Document("\n".join(texts), b"\n".join(encoded), where, together, replaced=replaced)


def _joined(where: str, values: Mapping[str, Any], which: str, options: ReadOptions) -> Document | InvalidDocument:
    """Return the text of the values of some keys, joined by empty lines; null and empty ones are left out of several.

    Args:
        where: the record's place, for a message.
        values: key -> value.
        which: names the text where a document has two.
        options: whether bytes that are not UTF-8 are replaced.
    """
    found: list[Document] = []
    for key, value in values.items():
        if value is None and len(values) > 1:
            continue
        name = f"{key!r} " if len(values) > 1 else which
        read = _text_of(where, key, value, name, replace=options.replace_bad_bytes)
        if isinstance(read, InvalidDocument):
            return read
        if read.text.strip():
            found.append(read)
    if not found:
        return InvalidDocument("empty", where, f"{which}is empty")
    if len(found) == 1:
        return found[0]
    replaced = any(part.replaced for part in found)
    return Document(
        BETWEEN_TEXTS.join(part.text for part in found),
        BETWEEN_TEXTS.encode().join(part.utf8 for part in found),
        where,
        replaced=replaced,
    )


def _text_of(where: str, key: str, value: Any, which: str, *, replace: bool) -> Document | InvalidDocument:
    """Return the text of one key, which may be empty; ``which`` names the key where there are several."""
    replaced = False
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            if not replace:
                problem = f"{which}byte 0x{value[error.start]:02x} is not valid UTF-8"
                return InvalidDocument("invalid_utf8", where, problem)
            value, replaced = value.decode(errors="replace"), True
    if not isinstance(value, str):
        return InvalidDocument("not_a_string", where, f"{key!r} is a JSON {json_type(value)}, not a string")
    try:
        return Document(value, value.encode(), where, replaced=replaced)
    except UnicodeEncodeError as error:  # JSON may hold characters that UTF-8 cannot encode
        if not replace:
            problem = f"{which}character {error.start} is half of a surrogate pair (\\u{ord(value[error.start]):04x})"
            return InvalidDocument("invalid_utf8", where, problem)
    value = value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return Document(value, value.encode(), where, replaced=True)


def _of_ids(where: str, key: str, value: Any) -> Document | InvalidDocument:
    """Return the document of a list of ids."""

    def refused(kind: InvalidDocumentKind, problem: str) -> InvalidDocument:
        return InvalidDocument(kind, where, problem)

    if not isinstance(value, list):
        return refused("bad_tokens", f"{key!r} is a JSON {json_type(value)}, not an array of ids")
    if not value:
        return refused("empty", "is empty")
    for place, index in enumerate(value):
        if type(index) is not int or not 0 <= index <= LARGEST_ID:
            shown = repr(index)[:SHOWN]
            return refused("bad_tokens", f"{key!r}[{place}] is {shown}, not a whole number from 0 to {LARGEST_ID}")
    return Document("", b"", where, tokens=value)


def _with_label(document: Document, record: Mapping[str, Any], key: str) -> Document | InvalidDocument:
    """Return ``document`` with the label of its record."""
    where, label = document.where, find_value(record, key)
    if label is MISSING:
        return InvalidDocument("missing_label", where, f"has no label: no key {key!r}; keys are {_keys_of(record)}")
    if isinstance(label, bytes):
        label = label.decode(errors="backslashreplace")
    if type(label) is int and abs(label) <= LARGEST_ID:
        return document._replace(label=label)
    if not isinstance(label, str):
        shown = f" ({label!r})"[: SHOWN + 3] if isinstance(label, int | float) and not isinstance(label, bool) else ""
        problem = f"label {key!r} is a JSON {json_type(label)}{shown}, not a string or whole number"
        return InvalidDocument("bad_label", where, problem)
    if not label.strip() or not label.isprintable():
        return InvalidDocument("bad_label", where, f"label {key!r} is {label[:SHOWN]!r}, empty or not printable")
    return document._replace(label=label)
