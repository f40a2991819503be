"""Chunk of text -> tokens of its documents: all the work of preprocessing that is done side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megachiar.data.fast_tokenizer import Engine, FastTokenizer
from megachiar.data.indexed import dtype_for_vocabulary
from megachiar.data.piece_tokenizer import in_pieces
from megachiar.data.readers import Chunk, Document, Trouble, TroubleLog, parse_chunk
from megachiar.data.settings import PreprocessSettings
from megachiar.data.tokenizer import Tokenizer, load_tokenizer
from megachiar.errors import UserError

IN_WORD = bytes(not chr(code).isspace() for code in range(128)) + bytes(128)  # of ASCII


class EncodedPart(NamedTuple):
    """Documents of one chunk that belong to one part of the split.

    Attributes:
        tokens: of all documents, one after another, shape (sum(lengths),), in the dataset's type.
        lengths: tokens of each document, shape (documents,), int64.
        text_bytes, words: of their text: UTF-8 bytes, and what stands between whitespace.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    text_bytes: int
    words: int


class EncodedChunk(NamedTuple):
    """What became of a chunk: one ``EncodedPart`` per part of the split, its troubles, and the input read for it."""

    parts: list[EncodedPart]
    log: TroubleLog
    consumed: int


class ChunkEncoder:
    """Chunk -> ``EncodedChunk``: all the work that is done in worker processes."""

    def __init__(self, settings: PreprocessSettings, tokenizer: Tokenizer):
        self._settings, self._tokenizer = settings, tokenizer
        self._dtype = dtype_for_vocabulary(tokenizer.vocab_size)

    @classmethod
    def load(cls, settings: PreprocessSettings, fingerprint: str, engine: Engine) -> ChunkEncoder:
        """The same in a process of its own, from the tokenizer's files.

        Args:
            fingerprint: of the tokenizer that the run began with.
            engine: ``fast`` or ``reference``.

        Raises:
            UserError: the tokenizer's files changed since.
        """
        encode_without_threads()
        tokenizer = load_tokenizer(settings.tokenizer, settings.tokenizer_kind, settings.eod_token)
        if tokenizer.fingerprint != fingerprint:
            raise UserError(settings.tokenizer, "was changed during the run", "start again and leave it alone")
        return cls(settings, FastTokenizer(tokenizer) if engine == "fast" else in_pieces(tokenizer))

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        log = TroubleLog(self._settings.on_error)
        documents = []
        for item in parse_chunk(chunk, self._settings.read.text_key):
            if isinstance(item, Trouble):
                log.add(item)
            else:
                documents.append(item)
        encoded = self._tokenizer.encode_batch([document.text for document in documents])
        members: list[list[tuple[Document, Sequence[int]]]] = [[] for _ in self._settings.prefixes]
        for document, ids in zip(documents, encoded, strict=True):
            if not len(ids):
                place = f"{chunk.source}, from line or document {chunk.first} on"
                log.add(Trouble("empty", place, f"the tokenizer makes no token of {document.text[:40]!r}"))
                continue
            members[self._part_of(document)].append((document, ids))
        return EncodedChunk([self._encoded_part(part) for part in members], log, chunk.consumed)

    def _part_of(self, document: Document) -> int:
        return self._settings.split.part_of(document.utf8) if self._settings.split else 0

    def _encoded_part(self, members: list[tuple[Document, Sequence[int]]]) -> EncodedPart:
        room = int(self._settings.append_eod)
        lengths = np.array([len(ids) + room for _, ids in members], dtype=np.int64)
        ends = np.cumsum(lengths)
        tokens = np.empty(lengths.sum(), np.int64)
        for (_, ids), end in zip(members, ends.tolist(), strict=True):
            tokens[end - room - len(ids) : end - room] = ids
        if self._settings.append_eod:
            tokens[ends - 1] = self._tokenizer.eod_id
        return EncodedPart(
            tokens=narrow(tokens, self._dtype, self._settings.tokenizer),
            lengths=lengths,
            text_bytes=sum(len(document.utf8) for document, _ in members),
            words=count_words(document for document, _ in members),
        )


def encode_without_threads() -> None:
    """Let ``tokenizers`` work in the thread that calls it: it is processes that work side by side here."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only switch


def count_words(documents: Iterable[Document]) -> int:
    """What stands between whitespace, as ``str.split`` finds it; several times faster where all is ASCII."""
    plain, words = [b""], 0
    for document in documents:
        if document.text.isascii():
            plain.append(document.utf8)
        else:
            words += len(document.text.split())
    marks = np.frombuffer(b" ".join(plain).translate(IN_WORD), np.bool_)
    return words + int(np.count_nonzero(marks[1:] > marks[:-1]))


def narrow(tokens: np.ndarray, dtype: np.dtype, tokenizer: Path) -> np.ndarray:
    """``tokens`` (int64, any shape) in ``dtype``.

    Raises:
        UserError: an id does not fit; stored anyway it would be another token.
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
