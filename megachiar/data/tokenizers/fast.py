"""Encode with gigatoken, which is tens of times faster than the reference libraries, behind the same interface.

Its ids are compared with the reference's on strings that are known to be hard, on the first documents of the input and
on one document now and then. Any difference ends its use. If it finds a control token in a text (it takes a literal
``<s>`` for one), the reference encodes that text.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from megachiar.data.tokenizers.choices import Engine
from megachiar.data.tokenizers.control_guard import ControlTokenError
from megachiar.data.tokenizers.pieces import with_piece_cache
from megachiar.data.tokenizers.tokenizer import ReferenceTokenizer, TokenIds, Tokenizer
from megachiar.errors import UserError
from megachiar.process_memory import give_back_free_memory, own_bytes

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
CHECKED_BYTES = 1 << 16  # of the input's first documents; also the size of the largest document checked now and then
CHECKED_EVERY = 64  # batches
GROUP_CHARACTERS = 1 << 19  # of the texts whose ids are searched for control ids at once
LARGEST_GROWTH = 24 << 20  # bytes: gigatoken caches every word it meets; beyond this growth it is opened anew


class FastTokenizer:
    """Encode with gigatoken the ids that ``reference`` gives; all other attributes are the reference's.

    Attributes:
        name: library and version.

    Args:
        reference: the tokenizer that serves as the truth.

    Raises:
        UserError: gigatoken is not installed or cannot serve this tokenizer.
    """

    def __init__(self, reference: ReferenceTokenizer):
        try:
            import gigatoken
        except ImportError as error:
            raise UserError(
                "--engine fast", "needs gigatoken, which is not installed", "pip install 'megachiar[fast]'"
            ) from error
        try:
            self._open = functools.partial(_open, gigatoken, reference)
            self._encode = self._open().encode
        except Exception as error:  # the library raises errors of its own for an unknown format
            reason = next(iter(str(error).splitlines()), type(error).__name__)  # places in its own source follow
            raise UserError(
                reference.path, f"gigatoken cannot serve this tokenizer: {reason}", "use --engine reference"
            ) from error
        self._reference = reference
        self.kind = reference.kind
        self.path = reference.path
        self.fingerprint = reference.fingerprint
        self.vocab_size = reference.vocab_size
        self.eod_id = reference.eod_id
        self.bos_id = reference.bos_id
        self.unknown_id = reference.unknown_id
        self.controls = reference.controls
        self.name = f"gigatoken {gigatoken.__version__}" if hasattr(gigatoken, "__version__") else "gigatoken"
        self._is_control = np.zeros(max(reference.vocab_size, 1), bool)  # by id
        self._is_control[[index for index in reference.controls if index < reference.vocab_size]] = True
        self._batches = self._resident = 0

    def encode(self, text: str) -> TokenIds:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[TokenIds]:
        """Encode with gigatoken, and compare a text now and then with the reference."""
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
        """Compare the ids of ``texts`` with the reference's.

        Raises:
            UserError: a text has other ids; the message names the text.
        """
        for text in texts:
            try:
                ids = self.encode(text)
            except ControlTokenError:  # the reference refuses it, and so do both
                continue
            self._compare(text, ids)

    def _encode_group(self, texts: list[str]) -> list[TokenIds]:
        """Encode a few texts; those that get a control token or an unknown id are encoded by the reference."""
        encoded = [self._encode(text) for text in texts]
        if not self._has_control(np.concatenate(encoded) if len(encoded) > 1 else encoded[0]):
            return encoded
        return [
            self._reference.encode(text) if self._has_control(ids) else ids
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def _bound_memory(self) -> None:
        """Open gigatoken anew if this process has grown too much since it was opened."""
        give_back_free_memory()
        if not self._resident:
            self._resident = own_bytes()
        elif own_bytes() - self._resident > LARGEST_GROWTH:
            del self._encode  # before the next one is there
            self._encode = self._open().encode
            give_back_free_memory()
            self._resident = own_bytes()

    def _has_control(self, ids: np.ndarray) -> bool:
        """Return whether a control id, or an id beyond the vocabulary, is among ``ids``."""
        return ids.size > 0 and (int(ids.max()) >= self._is_control.size or bool(self._is_control[ids].any()))

    def _check_one(self, texts: list[str], encoded: Sequence[TokenIds]) -> None:
        """Compare the first of ``texts`` that is not too large with the reference."""
        for text, ids in zip(texts, encoded, strict=True):
            if len(text) <= CHECKED_BYTES:
                self._compare(text, ids)
                return

    def _compare(self, text: str, ids: TokenIds) -> None:
        """Refuse ``ids`` of ``text`` that are not the reference's."""
        try:
            expected = self._reference.encode(text)
        except ControlTokenError as error:
            problem = f"{self.name} encodes a text, but the reference {error.problem}"
            raise UserError(self.path, problem, "use --engine reference") from error
        if np.array_equal(ids, expected):
            return
        first = next((n for n, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(expected))
        before = self._reference.decode(expected[max(0, first - 5) : first])
        raise UserError(
            self.path,
            f"{self.name} gives other ids than the reference after {before!r}: {list(map(int, ids[first:][:5]))}, "
            f"not {list(map(int, expected[first:][:5]))}",
            "use --engine reference, with --restart if a run was begun",
        )


def _groups(texts: list[str]) -> Iterator[list[str]]:
    """Cut ``texts`` into groups whose ids are searched at once; a large text is a group by itself and is not copied."""
    group: list[str] = []
    room = GROUP_CHARACTERS
    for text in texts:
        if group and len(text) > room:
            yield group
            group, room = [], GROUP_CHARACTERS
        group.append(text)
        room -= len(text)
    if group:
        yield group


class EngineChoice(NamedTuple):
    """The tokenizer that encodes, its ``kind`` (``"fast"`` or ``"reference"``), and the reason for the choice."""

    kind: Engine
    reason: str
    tokenizer: Tokenizer


def choose_engine(requested: Engine, reference: ReferenceTokenizer, texts: Iterable[str]) -> EngineChoice:
    """Choose the engine; the fast one must first give the reference's ids on hard strings and on ``texts``.

    Args:
        requested: ``fast`` insists; ``auto`` takes the reference where the fast engine is missing or differs.
        reference: the tokenizer as its own library encodes.
        texts: the first documents of the input.

    Raises:
        UserError: ``fast`` is requested, but is missing, cannot serve this tokenizer, or differs from the reference.
    """
    if requested == "reference":
        return EngineChoice("reference", "asked for", with_piece_cache(reference))
    if requested == "auto" and importlib.util.find_spec("gigatoken") is None:
        reason = "gigatoken, many times faster, is not installed: pip install 'megachiar[fast]'"
        return EngineChoice("reference", reason, with_piece_cache(reference))
    try:
        fast = FastTokenizer(reference)
        fast.check(HARD_TEXTS)
        fast.check(texts)
    except UserError as error:
        if requested == "fast":
            raise
        return EngineChoice("reference", error.problem, with_piece_cache(reference))
    return EngineChoice(
        "fast", f"{fast.name}, equal to the reference on {len(HARD_TEXTS)} hard texts and the input's first", fast
    )


def _open(gigatoken: Any, reference: ReferenceTokenizer) -> Any:
    """Return gigatoken's tokenizer of the same definition."""
    if reference.kind == "sentencepiece":
        return gigatoken.Tokenizer.from_sentencepiece(reference.definition())
    return gigatoken.Tokenizer.from_json(reference.definition())
