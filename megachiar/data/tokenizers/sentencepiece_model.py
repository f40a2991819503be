"""Tokenize with a SentencePiece model through the ``sentencepiece`` library."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from megachiar.data.tokenizers.control_guard import ControlGuard, any_of
from megachiar.data.tokenizers.edge_tokens import EdgeTokens
from megachiar.data.tokenizers.unsupported import refuse_unsupported
from megachiar.data.tokenizers.vocabulary_files import fingerprint, read_file, vocabulary_files
from megachiar.errors import UserError


class SentencePieceTokenizer:
    """Tokenize with a SentencePiece model; ``tokenizer.Tokenizer`` describes attributes and methods.

    ``eod_id`` is the model's EOS unless another token is named.

    Attributes:
        guarded: strings that the library would take for control tokens: a text is cut inside them.

    Args:
        path: the model's file, for errors.
        model: the content of that file.
        edges: the tokens at the edges of documents; where nobody names one, it is the model's EOS or BOS.

    Raises:
        UserError: ``model`` is not a SentencePiece model, or a token that is named is not in its vocabulary.
    """

    def __init__(self, path: Path, model: bytes, edges: EdgeTokens):
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
        by_piece = {piece: index for index, piece in enumerate(pieces)}
        self.eod_id = _known(edges.eod.find(path, by_piece, "end"), self._processor.eos_id())
        self.eod_named_by = edges.eod.named_by
        self.bos_id = None
        if edges.bos is not None:
            self.bos_id = _known(edges.bos.find(path, by_piece, "beginning"), self._processor.bos_id())
        self.unknown_id: int | None = unknown if (unknown := self._processor.unk_id()) >= 0 else None
        ordinary = self._ordinary_edges()
        self.guarded = frozenset(ordinary.values())
        self._guard = ControlGuard(path, ordinary, self._encode_plain)
        self.controls = ordinary | {i: piece for i, piece in enumerate(pieces) if self._processor.is_control(i)}
        self._model = model

    @classmethod
    def load(cls, path: Path, edges: EdgeTokens) -> SentencePieceTokenizer:
        """Load a ``.model`` file, or the one in the folder ``path``."""
        (file,) = vocabulary_files(path, "sentencepiece")
        return cls(file, read_file(file), edges)

    def encode(self, text: str) -> list[int]:
        return self._guard.clean(text, self._processor.encode(text))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return list(map(self._guard.clean, texts, self._encode_plain(texts)))

    def definition(self) -> bytes:
        """Return the content of the model's file."""
        return self._model

    def control_pattern(self) -> re.Pattern[str]:
        return any_of(self.controls.values())

    def encode_with_controls(self, text: str) -> list[int]:
        """Return the ids of the control tokens, and of each stretch of text between them as it is encoded by itself."""
        by_string = {string: index for index, string in self.controls.items()}
        ids: list[int] = []
        at = 0
        for match in self.control_pattern().finditer(text):
            ids += [*self._processor.encode(text[at : match.start()]), by_string[match[0]]]
            at = match.end()
        return [*ids, *self._processor.encode(text[at:])]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(index) for index in ids])

    def piece(self, index: int) -> str:
        """Return the string of an id."""
        return self._processor.id_to_piece(index)

    def known_ids(self) -> range:
        return range(self.vocab_size)

    def _ordinary_edges(self) -> dict[int, str]:
        """Return id and string of the tokens at the edges of documents that are ordinary or user-defined pieces.

        The library itself never gives a piece of type CONTROL, but it gives these.
        """
        edges = [index for index in (self.eod_id, self.bos_id) if index is not None]
        return {index: self._processor.id_to_piece(index) for index in edges if not self._processor.is_control(index)}

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)


def _known(named: int | None, own: int) -> int | None:
    """Return the id that is named, or else the model's own, which is negative where it has none."""
    return named if named is not None else own if own >= 0 else None
