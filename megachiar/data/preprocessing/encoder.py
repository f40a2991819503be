"""Turn chunks of text into tokens of their documents, which is all the work that worker processes do."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megachiar.data.inputs.chunk_groups import ChunkGroup
from megachiar.data.inputs.documents import Document, InvalidDocument, InvalidDocumentLog
from megachiar.data.inputs.parsing import parse_chunk
from megachiar.data.preprocessing.classes import class_of
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.storage.index_format import dtype_for_vocabulary
from megachiar.data.tokenizers.choices import Engine
from megachiar.data.tokenizers.control_guard import ControlTokenError
from megachiar.data.tokenizers.control_text import ControlTextTokenizer
from megachiar.data.tokenizers.fast import FastTokenizer
from megachiar.data.tokenizers.pieces import with_piece_cache
from megachiar.data.tokenizers.tokenizer import ReferenceTokenizer, TokenIds, Tokenizer
from megachiar.errors import UserError

IN_WORD = bytes(not chr(code).isspace() for code in range(128)) + bytes(128)  # whether a byte of ASCII is in a word
SHOWN_CLASSES = 200  # characters of the names of all classes in a message
COUNTED_AT_ONCE = 1 << 17  # characters: a list of words takes ten times the memory of the text


class EncodedPart(NamedTuple):
    """Hold the documents of some chunks that belong to one part of the split.

    Attributes:
        tokens: the tokens of all documents, one after another, shape (sum(lengths),), in the dataset's type.
        lengths: the number of tokens of each document, shape (documents,), int64.
        text_bytes: the UTF-8 bytes of their text.
        words: the whitespace-separated words of their text.
        unknown_tokens: the number of unknown tokens, for text that the vocabulary lacks.
        labels: the name of the class of each document; empty without labels.
    """

    tokens: NDArray[Any]
    lengths: NDArray[Any]
    text_bytes: int
    words: int
    unknown_tokens: int
    labels: Sequence[str] = ()


class EncodedGroup(NamedTuple):
    """Hold the result of one chunk group.

    Attributes:
        parts: one for each part of the split.
        log: the invalid documents.
        consumed: the bytes that were read from the disk for the group.
    """

    parts: list[EncodedPart]
    log: InvalidDocumentLog
    consumed: int


def with_controls(settings: PreprocessSettings, plain: Tokenizer, reference: ReferenceTokenizer) -> Tokenizer:
    """Return the tokenizer that encodes: ``plain``, or one that takes control strings in texts for control tokens."""
    return ControlTextTokenizer(plain, reference) if settings.allow_control_tokens else plain


class ChunkEncoder:
    """Encode a ``ChunkGroup`` into an ``EncodedGroup`` when it is called.

    Args:
        settings: of the run.
        tokenizer: the one that encodes.
    """

    def __init__(self, settings: PreprocessSettings, tokenizer: Tokenizer):
        self._settings, self._tokenizer = settings, tokenizer
        self._dtype = dtype_for_vocabulary(tokenizer.vocab_size)

    @classmethod
    def load(cls, settings: PreprocessSettings, fingerprint: str, engine: Engine) -> ChunkEncoder:
        """Make an encoder in a process of its own, from the tokenizer's files.

        Args:
            settings: of the run.
            fingerprint: the fingerprint of the tokenizer that the run began with.
            engine: ``fast`` or ``reference``.

        Raises:
            UserError: the tokenizer's files were changed since.
        """
        encode_without_threads()
        tokenizer = settings.load_tokenizer()
        if tokenizer.fingerprint != fingerprint:
            raise UserError(tokenizer.path, "was changed during the run", "start again and leave it alone")
        plain = FastTokenizer(tokenizer) if engine == "fast" else with_piece_cache(tokenizer)
        return cls(settings, with_controls(settings, plain, tokenizer))

    def __call__(self, group: ChunkGroup) -> EncodedGroup:
        log = InvalidDocumentLog(self._settings.on_error)
        parts = self._encode(group, log)  # the text is freed by now, so that there is room for its tokens
        consumed = sum(chunk.consumed for chunk in group.chunks)
        return EncodedGroup([self._encoded_part(*part) for part in parts], log, consumed)

    def _encode(self, group: ChunkGroup, log: InvalidDocumentLog) -> list[tuple[list[TokenIds], int, int, list[str]]]:
        """Return, for each part of the split, the ids of its documents, bytes and words of their text, and labels."""
        items = [self._with_class(item) for chunk in group.chunks for item in parse_chunk(chunk, self._settings.read)]
        encoded = iter(self._encode_documents([item for item in items if isinstance(item, Document)]))
        members: list[list[tuple[Document, TokenIds]]] = [[] for _ in self._settings.prefixes]
        for item in items:
            if isinstance(item, InvalidDocument):
                log.add(item)
                continue
            ids = next(encoded)
            if isinstance(ids, InvalidDocument):
                log.add(ids)
            else:
                log.replaced += item.replaced
                members[self._part_of(item)].append((item, ids))
        return [
            (
                [ids for _, ids in part],
                sum(len(document.utf8) for document, _ in part),
                count_words(document for document, _ in part),
                [str(document.label) for document, _ in part if document.label is not None],
            )
            for part in members
        ]

    def _with_class(self, item: Document | InvalidDocument) -> Document | InvalidDocument:
        """Return a document with the name of its class as its label, or the reason why it is of no class."""
        if isinstance(item, InvalidDocument) or item.label is None:
            return item
        classes = self._settings.classes
        name = class_of(item.label, classes)
        if name is None:
            known = ", ".join(classes or ())[:SHOWN_CLASSES]
            return InvalidDocument("unknown_class", item.where, f"label {item.label!r} is no class: these are {known}")
        return item._replace(label=name)

    def _encode_documents(self, documents: list[Document]) -> list[TokenIds | InvalidDocument]:
        """Return the ids of each document, or the reason why the tokenizer cannot encode it."""
        if self._settings.read.token_key is not None:
            return [self._check_ids(document) for document in documents]
        try:
            encoded = iter(self._tokenizer.encode_batch([text for document in documents for text in _texts(document)]))
        except ControlTokenError:  # one document caused it: the others are valid
            return [self._encode_one(document) for document in documents]
        return [self._joined(document, [next(encoded) for _ in _texts(document)]) for document in documents]

    def _encode_one(self, document: Document) -> TokenIds | InvalidDocument:
        """Return the ids of a document, or the reason why the tokenizer cannot encode it."""
        try:
            ids = self._tokenizer.encode_batch(list(_texts(document)))
        except ControlTokenError as error:
            return InvalidDocument("control_token", document.where, f"the tokenizer {error.problem}")
        return self._joined(document, ids)

    def _joined(self, document: Document, encoded: Sequence[TokenIds]) -> TokenIds | InvalidDocument:
        """Return the ids of a document: those of its text, or of two texts with the end-of-document token between."""
        most = self._settings.max_text_tokens
        for text, ids in zip(_texts(document), encoded, strict=True):
            if not len(ids):
                return InvalidDocument("empty", document.where, f"the tokenizer makes no token of {text[:40]!r}")
        kept = encoded if most is None else [ids[:most] for ids in encoded]
        if len(kept) == 1:
            return kept[0]
        first, second = kept
        return np.concatenate([np.asarray(first), [self._tokenizer.eod_id], np.asarray(second)])

    def _check_ids(self, document: Document) -> TokenIds | InvalidDocument:
        """Return the ready-made ids of a document, or the reason why they are none of the vocabulary."""
        ids = np.array(document.tokens, np.int64)[: self._settings.max_text_tokens]
        size = self._tokenizer.vocab_size
        if int(ids.max()) >= size:
            place = int(np.argmax(ids >= size))
            problem = f"id {ids[place]} at place {place} is not below --vocab-size {size}"
            return InvalidDocument("bad_tokens", document.where, problem)
        return ids

    def _part_of(self, document: Document) -> int:
        """Return the part of the split that a document belongs to."""
        if self._settings.split is None:
            return 0
        tokens = document.tokens
        return self._settings.split.part_of(document.utf8 if tokens is None else np.array(tokens, "<i4").tobytes())

    def _encoded_part(self, encoded: list[TokenIds], text_bytes: int, words: int, labels: list[str]) -> EncodedPart:
        """Join the ids of the documents of one part, with the tokens at the edges of documents."""
        room = int(self._settings.append_eod)
        before = int(self._tokenizer.bos_id is not None)
        lengths = np.array([before + len(ids) + room for ids in encoded], dtype=np.int64)
        ends = np.cumsum(lengths)
        types = {ids.dtype if isinstance(ids, np.ndarray) else np.dtype(np.int64) for ids in encoded}
        tokens = np.empty(lengths.sum(), np.result_type(np.uint8, *types))
        for ids, end in zip(encoded, ends.tolist(), strict=True):
            tokens[end - room - len(ids) : end - room] = ids
        if self._settings.append_eod:
            tokens[ends - 1] = self._tokenizer.eod_id
        if self._tokenizer.bos_id is not None:
            tokens[ends - lengths] = self._tokenizer.bos_id
        unknown, eod = self._tokenizer.unknown_id, self._tokenizer.eod_id
        unknown_tokens = 0 if unknown in (None, eod) else int(np.count_nonzero(tokens == unknown))
        narrowed = narrow(tokens, self._dtype, self._tokenizer.path)
        return EncodedPart(narrowed, lengths, text_bytes, words, unknown_tokens, labels)


def _texts(document: Document) -> tuple[str, ...]:
    """Return the texts of a document that are encoded each by itself."""
    return document.texts or (document.text,)


def encode_without_threads() -> None:
    """Keep ``tokenizers`` from starting threads, since whole processes work in parallel here."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only switch


def count_words(documents: Iterable[Document]) -> int:
    """Count the words as ``str.split`` finds them; this is several times faster where the text is ASCII."""
    plain, words = [b""], 0
    for document in documents:
        if document.text.isascii():
            plain.append(document.utf8)
        else:
            words += _count_any(document.text)
    text = b" ".join(plain)
    for first in range(0, len(text) - 1, COUNTED_AT_ONCE):
        marks = np.frombuffer(text[first : first + COUNTED_AT_ONCE + 1].translate(IN_WORD), np.bool_)
        words += int(np.count_nonzero(marks[1:] > marks[:-1]))
    return words


def _count_any(text: str) -> int:
    """Count the words of a text that is not all ASCII."""
    words = 0
    for first in range(0, len(text), COUNTED_AT_ONCE):
        words += len(text[first : first + COUNTED_AT_ONCE].split())
        if first and not (text[first - 1].isspace() or text[first].isspace()):
            words -= 1  # which was cut in two
    return words


def narrow(tokens: NDArray[Any], dtype: np.dtype[Any], tokenizer: Path) -> NDArray[Any]:
    """Convert ``tokens`` (any integer type and shape) to ``dtype``.

    Args:
        tokens: the token ids.
        dtype: an integer type.
        tokenizer: the tokenizer's file, for the error.

    Raises:
        UserError: an id does not fit; if it were stored, it would become another token.
    """
    limits = np.iinfo(dtype)
    if tokens.size and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
        worst = tokens.max() if tokens.max() > limits.max else tokens.min()
        raise UserError(
            tokenizer,
            f"gave token id {worst}, but its vocabulary is stored as {dtype.name} ({limits.min} to {limits.max})",
            "the tokenizer's own vocabulary size is wrong: export it again",
        )
    return tokens.astype(dtype)
