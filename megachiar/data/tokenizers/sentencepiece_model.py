"""Tokenize with a SentencePiece model through the ``sentencepiece`` library."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megachiar.data.tokenizers.control_guard import ControlGuard
from megachiar.data.tokenizers.unsupported import refuse_unsupported
from megachiar.data.tokenizers.vocabulary_files import find_token, fingerprint, read_file, vocabulary_files
from megachiar.errors import UserError


class SentencePieceTokenizer:
    """Tokenize with a SentencePiece model; ``tokenizer.Tokenizer`` describes attributes and methods.

    ``eod_id`` is the model's EOS unless another token is named.

    Args:
        path: the model's file, for errors.
        model: the content of that file.
        eod_token: the token that ends a document, as a string or an id; None takes the model's EOS.

    Raises:
        UserError: ``model`` is not a SentencePiece model, or ``eod_token`` is not in its vocabulary.
    """

    def __init__(self, path: Path, model: bytes, eod_token: str | int | None = None):
        import sentencepiece

        try:
            if not model:
                raise RuntimeError("empty")  # the library takes no bytes for a model without pieces
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            pieces = [self._processor.id_to_piece(index) for index in range(self._processor.vocab_size())]
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            refuse_unsupported(path, model)
            raise UserError(
                path,
                f"is not a SentencePiece model ({len(model)} bytes)",
                "give the .model file that its trainer wrote",
            ) from error
        self.kind = "sentencepiece"
        self.path = path
        self.fingerprint = fingerprint([model])
        self.vocab_size: int = len(pieces)
        self.eod_id = self._choose_eod(eod_token)
        self.unknown_id: int | None = unknown if (unknown := self._processor.unk_id()) >= 0 else None
        ordinary = self._ordinary_eod()
        self._guard = ControlGuard(path, ordinary, self._encode_plain)
        self.controls = ordinary | {i: piece for i, piece in enumerate(pieces) if self._processor.is_control(i)}
        self._model = model

    @classmethod
    def load(cls, path: Path, eod_token: str | int | None) -> SentencePieceTokenizer:
        """Load a ``.model`` file, or the one in the folder ``path``."""
        (file,) = vocabulary_files(path, "sentencepiece")
        return cls(file, read_file(file), eod_token)

    def encode(self, text: str) -> list[int]:
        return self._guard.clean(text, self._processor.encode(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return list(map(self._guard.clean, texts, self._encode_plain(texts)))

    def definition(self) -> bytes:
        """Return the content of the model's file."""
        return self._model

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(index) for index in ids])

    def known_ids(self) -> range:
        return range(self.vocab_size)

    def _choose_eod(self, eod_token: str | int | None) -> int | None:
        if eod_token is None:
            return eos if (eos := self._processor.eos_id()) >= 0 else None
        pieces = {self._processor.id_to_piece(index): index for index in range(self.vocab_size)}
        return find_token(self.path, eod_token, pieces)

    def _ordinary_eod(self) -> dict[int, str]:
        """Return id and string of the end-of-document token if it is an ordinary or user-defined piece, else nothing.

        The library itself never gives a piece of type CONTROL, but it gives these.
        """
        if self.eod_id is None or self._processor.is_control(self.eod_id):
            return {}
        return {self.eod_id: self._processor.id_to_piece(self.eod_id)}

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)
