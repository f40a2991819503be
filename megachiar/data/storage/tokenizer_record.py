"""Record which tokenizer made a dataset, or belongs to a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """Describe the tokenizer that a dataset was made with.

    Attributes:
        kind: ``sentencepiece``, ``huggingface`` or ``gpt2``.
        file: where it was found when the dataset was made: absolute, or relative to the manifest's folder.
        fingerprint: ``"sha256:..."`` of the content of its vocabulary files.
        vocab_size: the largest id that can occur, plus one.
        eod_id: the id that ends a document; None if the tokenizer has none.
        bos_id: the id that each document begins with; None if documents begin with their text.
        hub: ``hf:NAME@COMMIT`` of a tokenizer that was fetched from the Hugging Face hub; None for local files.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: str
    file: str
    fingerprint: str
    vocab_size: int
    eod_id: int | None = None
    bos_id: int | None = None
    hub: str | None = None

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}, below 1")

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON can represent them; what earlier versions did not have is there where it is set."""
        optional = {key: value for key, value in (("bos_id", self.bos_id), ("hub", self.hub)) if value is not None}
        return {
            "kind": self.kind,
            "file": self.file,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "eod_id": self.eod_id,
            **optional,
        }
