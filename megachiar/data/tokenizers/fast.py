"""gigatoken, which encodes tens of times faster than the reference libraries, behind the same interface.

It is believed only as far as it is proved: its ids are compared with the reference's on strings that are known to be
hard, on the first documents of the input and on one document now and then, and any difference ends its use. Text in
which it sees a control token (it takes a literal ``<s>`` for one) is encoded by the reference.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from megachiar.data.tokenizers.pieces import in_pieces
from megachiar.data.tokenizers.tokenizer import ControlTokenError, Tokenizer
from megachiar.errors import UserError
from megachiar.process_memory import give_back_free_memory, own_bytes

Engine = Literal["auto", "fast", "reference"]

HARD_TEXTS = (
    "It's we'll I'D they've 'tis 2024-01-31 1234567890 3.14e-10 $9.99 100%",
    "  two  spaces   three\ttab\n\n\nlines \r\nwindows\rmac \x0b\x0c trailing   ",
    "\u00a0no-break\u2003em\u3000ideographic\u200bzero-width\u200d\ufeffmark \x85 \u2028",
    "naïve café Straße ﬁne Å Å é é ñ İi ſ ǅ Ω Ω",
    "日本語のテキスト、中文文本。한국어 텍스트 ไทย हिन्दी עברית العربية ქართული",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ \U0001f9ff\U00010348 \U000e0041",
    "def f(x):\n\treturn {k: v**2 for k, v in x.items()} # <|x|> </s> <s> [INST] <unk> <pad> [MASK]\n" + "=" * 90,
    "\x00\x01\x1f\x7f\ufffd\ue000 a\u0301\u0323\u0302 ... !!!??? --- ____ ~~~ \\\\ //",
    "a" * 300 + " " * 70 + "ab" * 80 + "\n" * 40,
)
CHECKED_BYTES = 1 << 16  # of the input's first documents, and at most of a document that is checked now and then
CHECKED_EVERY = 64  # batches
LOOKED_AT_TOGETHER = 1 << 19  # characters
LARGEST_GROWTH = 24 << 20  # bytes: gigatoken remembers every word it meets; beyond that it is opened anew


class FastTokenizer:
    """A tokenizer whose ids are those of ``reference``; attributes are the reference's.

    Attributes:
        name: library and version.

    Raises:
        UserError: gigatoken is not installed or cannot serve this tokenizer.
    """

    def __init__(self, reference: Tokenizer):
        try:
            import gigatoken
        except ImportError as error:
            raise UserError(
                "--engine fast", "needs gigatoken, which is not installed", "pip install 'megachiar[fast]'"
            ) from error
        try:
            self._open = functools.partial(_open, gigatoken, reference)
            self._encode = self._open().encode
        except Exception as error:  # whatever a library raises of its own for what it does not know
            raise UserError(
                reference.path, f"gigatoken cannot serve this tokenizer: {error}", "use --engine reference"
            ) from error
        self._reference = reference
        self.kind, self.path, self.fingerprint = reference.kind, reference.path, reference.fingerprint
        self.vocab_size, self.eod_id = reference.vocab_size, reference.eod_id
        self.unknown_id = reference.unknown_id
        self.controls = reference.controls
        self.name = f"gigatoken {gigatoken.__version__}" if hasattr(gigatoken, "__version__") else "gigatoken"
        self._forbidden = np.zeros(max(reference.vocab_size, 1), bool)
        self._forbidden[[index for index in reference.controls if index < reference.vocab_size]] = True
        self._batches = self._resident = 0

    def encode(self, text: str) -> Sequence[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[Sequence[int]]:
        if self._batches % CHECKED_EVERY == 1:
            self._bound_memory()
        encoded = [ids for group in _groups(texts) for ids in self._encode_group(group)]
        if self._batches % CHECKED_EVERY == 0:
            self._check_one(texts, encoded)
        self._batches += 1
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        return self._reference.decode(ids)

    def known_ids(self) -> Sequence[int]:
        return self._reference.known_ids()

    def check(self, texts: Iterable[str]) -> None:
        """Compare with the reference.

        Raises:
            UserError: a text has other ids; it names the text.
        """
        for text in texts:
            try:
                ids = self.encode(text)
            except ControlTokenError:  # the reference refuses it, and so do both
                continue
            self._compare(text, ids)

    def _encode_group(self, texts: list[str]) -> list[Sequence[int]]:
        encoded: list[Sequence[int]] = [self._encode(text) for text in texts]
        if self._is_suspect(np.concatenate(encoded) if len(encoded) > 1 else encoded[0]):
            for row, ids in enumerate(encoded):
                if self._is_suspect(ids):
                    encoded[row] = self._reference.encode(texts[row])
        return encoded

    def _bound_memory(self) -> None:
        give_back_free_memory()
        if not self._resident:
            self._resident = own_bytes()
        elif own_bytes() - self._resident > LARGEST_GROWTH:
            del self._encode  # before the next one is there
            self._encode = self._open().encode
            give_back_free_memory()
            self._resident = own_bytes()

    def _is_suspect(self, ids: np.ndarray) -> bool:
        return ids.size > 0 and (int(ids.max()) >= self._forbidden.size or bool(self._forbidden[ids].any()))

    def _check_one(self, texts: list[str], encoded: list[Sequence[int]]) -> None:
        for text, ids in zip(texts, encoded, strict=True):
            if len(text) <= CHECKED_BYTES:
                self._compare(text, ids)
                return

    def _compare(self, text: str, ids: Sequence[int]) -> None:
        try:
            expected = self._reference.encode(text)
        except ControlTokenError as error:
            problem = f"{self.name} encodes a text of which the reference {error.problem}"
            raise UserError(self.path, problem, "use --engine reference") from error
        if np.array_equal(ids, expected):
            return
        place = next((n for n, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(expected))
        before = self._reference.decode(expected[max(0, place - 5) : place])
        raise UserError(
            self.path,
            f"{self.name} gives other ids than the reference after {before!r}: {list(map(int, ids[place:][:5]))}, "
            f"not {list(map(int, expected[place:][:5]))}",
            "use --engine reference, with --restart if a run was begun",
        )


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """``texts`` in groups whose ids are looked at together; a large text is one by itself, which needs no copy."""
    group: list[str] = []
    room = LOOKED_AT_TOGETHER
    for text in texts:
        if group and len(text) > room:
            yield group
            group, room = [], LOOKED_AT_TOGETHER
        group.append(text)
        room -= len(text)
    if group:
        yield group


class ChosenEngine(NamedTuple):
    """What encodes, and why: ``kind`` is ``"fast"`` or ``"reference"``."""

    kind: Engine
    why: str
    tokenizer: Tokenizer


def choose_engine(wanted: Engine, reference: Tokenizer, texts: Iterable[str]) -> ChosenEngine:
    """Decide what encodes, proving the fast engine on hard strings and on ``texts``, the input's first documents.

    Args:
        wanted: ``fast`` insists, ``auto`` takes the reference where the fast one is missing or differs.

    Raises:
        UserError: ``fast`` is wanted, but missing, unable, or not equal to the reference.
    """
    if wanted == "reference":
        return ChosenEngine("reference", "asked for", in_pieces(reference))
    if wanted == "auto" and importlib.util.find_spec("gigatoken") is None:
        why = "gigatoken, many times faster, is not installed: pip install 'megachiar[fast]'"
        return ChosenEngine("reference", why, in_pieces(reference))
    try:
        fast = FastTokenizer(reference)
        fast.check(HARD_TEXTS)
        fast.check(texts)
    except UserError as error:
        if wanted == "fast":
            raise
        return ChosenEngine("reference", error.problem, in_pieces(reference))
    return ChosenEngine(
        "fast", f"{fast.name}, equal to the reference on {len(HARD_TEXTS)} hard texts and the input's first", fast
    )


def _open(gigatoken: Any, reference: Tokenizer) -> Any:
    """gigatoken's tokenizer of the same definition."""
    if reference.kind == "sentencepiece":
        return gigatoken.Tokenizer.from_sentencepiece(reference.definition())
    return gigatoken.Tokenizer.from_json(reference.definition())
