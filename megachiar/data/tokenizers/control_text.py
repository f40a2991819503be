"""Encode control strings that stand in a text as the control tokens they name, where the user allows it.

Chat transcripts and pretokenized corpora hold ``<|im_start|>`` or ``<|endoftext|>`` on purpose. Only a text that holds
such a string is encoded here, by the tokenizer's own library. All other texts go to whatever encodes fastest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megachiar.data.tokenizers.tokenizer import ReferenceTokenizer, TokenIds, Tokenizer


class ControlTextTokenizer:
    """Encode texts with their control strings; all other attributes are those of ``plain``.

    Args:
        plain: encodes texts without control strings.
        reference: the same tokenizer by its own library.
    """

    def __init__(self, plain: Tokenizer, reference: ReferenceTokenizer):
        self._plain, self._reference = plain, reference
        self._pattern = reference.control_pattern()
        self.kind = reference.kind
        self.path = reference.path
        self.fingerprint = reference.fingerprint
        self.vocab_size = reference.vocab_size
        self.eod_id = reference.eod_id
        self.bos_id = reference.bos_id
        self.controls = reference.controls
        self.unknown_id = reference.unknown_id

    def encode(self, text: str) -> TokenIds:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[TokenIds]:
        """Return the ids of each text; those with a control string are encoded by the library, the others as before."""
        has_control = [self._pattern.search(text) is not None for text in texts]
        plain = iter(self._plain.encode_batch([text for text, has in zip(texts, has_control, strict=True) if not has]))
        return [
            self._reference.encode_with_controls(text) if has else next(plain)
            for text, has in zip(texts, has_control, strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        return self._reference.decode(ids)

    def known_ids(self) -> Sequence[int]:
        return self._reference.known_ids()
