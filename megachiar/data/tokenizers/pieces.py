"""Cache the reference library's ids of each piece of text: the ids are the same, the time is a quarter.

``tokenizers`` spends nearly all its time on cutting a text into words and on copying them, and it has seen most words
thousands of times. GPT-2's byte-level BPE encodes each word by itself, and there are places where its expression

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

always cuts, whatever the text around them is. A word of ASCII letters or digits ends before any other ASCII character,
and only whitespace continues whitespace. A text is cut at such places only. So each piece is one or more of the
library's words, and the ids of a text are the ids of its pieces. No cut is made next to a character outside ASCII.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megachiar.data.tokenizers.huggingface_model import HuggingFaceTokenizer
from megachiar.data.tokenizers.tokenizer import ReferenceTokenizer, Tokenizer

PIECE = re.compile(
    r"[ \n]*(?:"
    r"[!-/:-@\[-`{-~]*[A-Za-z0-9]+(?![A-Za-z0-9]|[^\x00-\x7f])"  # punctuation and the word that it stands before
    r"|[^ \n]+(?:(?<![!-~\w])[ \n]+[^ \n]*)*"  # up to whitespace that follows none: tabs may belong to it
    r")|[ \n]+"  # at the end of the text
)
MOST_CACHED = 1 << 18  # pieces
MOST_CACHED_BYTES = 64 << 20  # of these pieces and their ids, about
LONGEST_CACHED = 64  # characters
CHECKED_EVERY = 64  # batches
LONGEST_CHECKED = 1 << 16  # characters


def with_piece_cache(reference: ReferenceTokenizer) -> Tokenizer:
    """Return ``reference`` behind a cache of pieces where its texts may be cut, else ``reference`` itself."""
    if isinstance(reference, HuggingFaceTokenizer) and reference.uses_gpt2_words:
        return PieceTokenizer(reference)
    return reference


class PieceTokenizer:
    """Encode pieces of text through a cache; ids and attributes are those of ``reference``.

    One document now and then is encoded whole as well and compared.

    Raises:
        RuntimeError: the ids differ, which is a defect of this class.
    """

    def __init__(self, reference: HuggingFaceTokenizer):
        self._reference = reference
        self.kind = reference.kind
        self.path = reference.path
        self.fingerprint = reference.fingerprint
        self.vocab_size = reference.vocab_size
        self.eod_id = reference.eod_id
        self.bos_id = reference.bos_id
        self.controls = reference.controls
        self.unknown_id = reference.unknown_id
        self._cache: dict[str, bytes] = {}  # piece -> its ids as int32
        self._batches = 0

    def encode(self, text: str) -> np.ndarray[Any, np.dtype[Any]]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray[Any, np.dtype[Any]]]:
        """Join the ids of each text's pieces; the reference encodes only those that are not in the cache."""
        cache, rows = self._cache, list(map(PIECE.findall, texts))
        missing = {piece for row in rows for piece in row if piece not in cache}
        if len(cache) + len(missing) > MOST_CACHED:
            cache.clear()
            missing = {piece for row in rows for piece in row}
        new = list(missing)
        for piece, ids in zip(new, self._reference.encode_batch(new), strict=True):
            cache[piece] = np.array(ids, np.int32).tobytes()
        encoded = [np.frombuffer(b"".join(map(cache.__getitem__, row)), np.int32) for row in rows]
        for piece in new:
            if len(piece) > LONGEST_CACHED:
                del cache[piece]
        if self._batches % CHECKED_EVERY == 0:
            self._check_one(texts, encoded)
        self._batches += 1
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        return self._reference.decode(ids)

    def known_ids(self) -> Sequence[int]:
        return self._reference.known_ids()

    def _check_one(self, texts: list[str], encoded: list[np.ndarray[Any, np.dtype[Any]]]) -> None:
        """Compare the first of ``texts`` that is not too long with the reference."""
        for text, ids in zip(texts, encoded, strict=True):
            if len(text) <= LONGEST_CHECKED:
                if not np.array_equal(ids, self._reference.encode(text)):
                    raise RuntimeError(f"{self.path}: a text in pieces has other ids than as a whole: {text[:2000]!r}")
                return
