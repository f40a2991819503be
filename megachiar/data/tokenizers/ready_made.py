"""Stand in for the tokenizer of a dataset whose ids were ready-made, so that no tokenizer made them of text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

READY_MADE = "ids"
"""The kind of tokenizer that a manifest records where there was none."""


class ReadyMadeIds:
    """Describe ids below ``vocab_size`` that no tokenizer made; ``tokenizer.Tokenizer`` describes the attributes.

    Two datasets of ready-made ids fit each other if their ``vocab_size`` is the same.

    Args:
        vocab_size: the largest id that can occur, plus one.
    """

    def __init__(self, vocab_size: int):
        self.kind = READY_MADE
        self.path = Path("none")
        self.vocab_size = vocab_size
        self.eod_id: int | None = None
        self.eod_named_by = ""
        self.bos_id: int | None = None
        self.unknown_id: int | None = None
        self.fingerprint = f"sha256:{hashlib.sha256(f'ready-made ids below {vocab_size}'.encode()).hexdigest()}"
        self.controls: dict[int, str] = {}

    def encode(self, text: str) -> NoReturn:
        raise AssertionError("ready-made ids are made of no text")

    def encode_batch(self, texts: list[str]) -> NoReturn:
        raise AssertionError("ready-made ids are made of no text")

    def definition(self) -> NoReturn:
        raise AssertionError("ready-made ids have no definition")

    def control_pattern(self) -> NoReturn:
        raise AssertionError("ready-made ids have no control strings")

    def encode_with_controls(self, text: str) -> NoReturn:
        raise AssertionError("ready-made ids are made of no text")

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))

    def known_ids(self) -> range:
        return range(self.vocab_size)
