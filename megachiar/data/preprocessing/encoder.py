"""Turn chunks of text into tokens of their documents, which is all the work that worker processes do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megachiar.data.inputs.chunk_groups import ChunkGroup
from megachiar.data.inputs.documents import Document, InvalidDocument, InvalidDocumentLog, parse_chunk
from megachiar.data.preprocessing.settings import PreprocessSettings
from megachiar.data.storage.index_format import dtype_for_vocabulary
from megachiar.data.tokenizers.choices import Engine
from megachiar.data.tokenizers.control_guard import ControlTokenError
from megachiar.data.tokenizers.fast import FastTokenizer
from megachiar.data.tokenizers.pieces import with_piece_cache
from megachiar.data.tokenizers.tokenizer import TokenIds, Tokenizer, load_tokenizer
from megachiar.errors import UserError

IN_WORD = bytes(not chr(code).isspace() for code in range(128)) + bytes(128)  # whether a byte of ASCII is in a word
COUNTED_AT_ONCE = 1 << 17  # characters: a list of words takes ten times the memory of the text


class EncodedPart(NamedTuple):
    """Hold the documents of some chunks that belong to one part of the split.

    Attributes:
        tokens: the tokens of all documents, one after another, shape (sum(lengths),), in the dataset's type.
        lengths: the number of tokens of each document, shape (documents,), int64.
        text_bytes: the UTF-8 bytes of their text.
        words: the whitespace-separated words of their text.
        unknown_tokens: the number of unknown tokens, for text that the vocabulary lacks.
    """

    tokens: NDArray[Any]
    lengths: NDArray[Any]
    text_bytes: int
    words: int
    unknown_tokens: int


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
        tokenizer = load_tokenizer(settings.tokenizer, settings.tokenizer_kind, settings.eod_token)
        if tokenizer.fingerprint != fingerprint:
            raise UserError(settings.tokenizer, "was changed during the run", "start again and leave it alone")
        return cls(settings, FastTokenizer(tokenizer) if engine == "fast" else with_piece_cache(tokenizer))

    def __call__(self, group: ChunkGroup) -> EncodedGroup:
        log = InvalidDocumentLog(self._settings.on_error)
        parts = self._encode(group, log)  # the text is freed by now, so that there is room for its tokens
        consumed = sum(chunk.consumed for chunk in group.chunks)
        return EncodedGroup([self._encoded_part(*part) for part in parts], log, consumed)

    def _encode(self, group: ChunkGroup, log: InvalidDocumentLog) -> list[tuple[list[TokenIds], int, int]]:
        """Return, for each part of the split, the ids of its documents, and the bytes and words of their text."""
        key = self._settings.read.text_key
        items = [item for chunk in group.chunks for item in parse_chunk(chunk, key)]
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
                members[self._part_of(item)].append((item, ids))
        return [
            (
                [ids for _, ids in part],
                sum(len(document.utf8) for document, _ in part),
                count_words(document for document, _ in part),
            )
            for part in members
        ]

    def _encode_documents(self, documents: list[Document]) -> list[TokenIds | InvalidDocument]:
        """Return the ids of each document, or the reason why the tokenizer cannot encode it."""
        try:
            encoded = self._tokenizer.encode_batch([document.text for document in documents])
        except ControlTokenError:  # one document caused it: the others are valid
            return [self._encode_one(document) for document in documents]
        return [
            ids if len(ids) else _without_tokens(document) for document, ids in zip(documents, encoded, strict=True)
        ]

    def _encode_one(self, document: Document) -> TokenIds | InvalidDocument:
        """Return the ids of a document, or the reason why the tokenizer cannot encode it."""
        try:
            ids = self._tokenizer.encode_batch([document.text])[0]
        except ControlTokenError as error:
            return InvalidDocument("control_token", document.where, f"the tokenizer {error.problem}")
        return ids if len(ids) else _without_tokens(document)

    def _part_of(self, document: Document) -> int:
        """Return the part of the split that a document belongs to."""
        return self._settings.split.part_of(document.utf8) if self._settings.split else 0

    def _encoded_part(self, encoded: list[TokenIds], text_bytes: int, words: int) -> EncodedPart:
        """Join the ids of the documents of one part, with their end-of-document tokens."""
        room = int(self._settings.append_eod)
        lengths = np.array([len(ids) + room for ids in encoded], dtype=np.int64)
        ends = np.cumsum(lengths)
        types = {ids.dtype if isinstance(ids, np.ndarray) else np.dtype(np.int64) for ids in encoded}
        tokens = np.empty(lengths.sum(), np.result_type(np.uint8, *types))
        for ids, end in zip(encoded, ends.tolist(), strict=True):
            tokens[end - room - len(ids) : end - room] = ids
        if self._settings.append_eod:
            tokens[ends - 1] = self._tokenizer.eod_id
        unknown, eod = self._tokenizer.unknown_id, self._tokenizer.eod_id
        unknown_tokens = 0 if unknown in (None, eod) else int(np.count_nonzero(tokens == unknown))
        narrowed = narrow(tokens, self._dtype, self._settings.tokenizer)
        return EncodedPart(narrowed, lengths, text_bytes, words, unknown_tokens)


def _without_tokens(document: Document) -> InvalidDocument:
    """Say that a document gives no token."""
    return InvalidDocument("empty", document.where, f"the tokenizer makes no token of {document.text[:40]!r}")


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
