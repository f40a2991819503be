"""The reference library, asked once for each piece of text: the same ids in a quarter of the time.

``tokenizers`` spends nearly all its time on cutting a text into words and on copying them, most of which it has seen
thousands of times. GPT-2's byte-level BPE encodes each word by itself, and there are places where its expression

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

always cuts, whatever stands around them: a word with letters or digits ends where another ASCII character follows its
ASCII ones, and nothing but whitespace goes on with whitespace. A text is cut at such places only, so that each piece is
one or more of the library's words, and the ids of a text are those of its pieces. Where a character outside ASCII is
near, the next place is waited for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from megachiar.data.tokenizers.tokenizer import HuggingFaceTokenizer, Tokenizer

PIECE = re.compile(
    r"[ \n]*(?:"
    r"[!-/:-@\[-`{-~]*[A-Za-z0-9]+(?![A-Za-z0-9]|[^\x00-\x7f])"  # punctuation and the word that it stands before
    r"|[^ \n]+(?:(?<![!-~\w])[ \n]+[^ \n]*)*"  # up to whitespace that follows none: tabs may belong to it
    r")|[ \n]+"  # at the end of the text
)
MOST_KNOWN = 1 << 18  # pieces
MOST_KNOWN_BYTES = 64 << 20  # of them, about
LONGEST_KNOWN = 64  # characters
CHECKED_EVERY = 64  # batches
LONGEST_CHECKED = 1 << 16  # characters


def in_pieces(reference: Tokenizer) -> Tokenizer:
    """``reference``, asked piece by piece where its texts may be cut."""
    if isinstance(reference, HuggingFaceTokenizer) and reference.cuts_like_gpt2:
        return PieceTokenizer(reference)
    return reference


class PieceTokenizer:
    """A tokenizer whose ids are those of ``reference``; attributes are the reference's.

    One document now and then is encoded whole as well and compared.

    Raises:
        RuntimeError: the ids differ, which is a defect of this class.
    """

    def __init__(self, reference: HuggingFaceTokenizer):
        self._reference = reference
        self.kind, self.path, self.fingerprint = reference.kind, reference.path, reference.fingerprint
        self.vocab_size, self.eod_id, self.controls = reference.vocab_size, reference.eod_id, reference.controls
        self.unknown_id = reference.unknown_id
        self._known: dict[str, bytes] = {}  # piece -> its ids as int32
        self._batches = 0

    def encode(self, text: str) -> Sequence[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[Sequence[int]]:
        known, rows = self._known, list(map(PIECE.findall, texts))
        missing = {piece for row in rows for piece in row if piece not in known}
        if len(known) + len(missing) > MOST_KNOWN:
            known.clear()
            missing = {piece for row in rows for piece in row}
        asked = list(missing)
        for piece, ids in zip(asked, self._reference.encode_batch(asked), strict=True):
            known[piece] = np.array(ids, np.int32).tobytes()
        encoded = [np.frombuffer(b"".join(map(known.__getitem__, row)), np.int32) for row in rows]
        for piece in asked:
            if len(piece) > LONGEST_KNOWN:
                del known[piece]
        if self._batches % CHECKED_EVERY == 0:
            self._check_one(texts, encoded)
        self._batches += 1
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        return self._reference.decode(ids)

    def known_ids(self) -> Sequence[int]:
        return self._reference.known_ids()

    def _check_one(self, texts: list[str], encoded: list[Sequence[int]]) -> None:
        for text, ids in zip(texts, encoded, strict=True):
            if len(text) <= LONGEST_CHECKED:
                if not np.array_equal(ids, self._reference.encode(text)):
                    raise RuntimeError(f"{self.path}: a text in pieces has other ids than as a whole: {text[:2000]!r}")
                return
