"""A SentencePiece tokenizer for the library transformers, whose ids are those that the library sentencepiece gives.

``AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)`` loads this file from the folder that ``megachiar
export --to hf`` has written. Text stays text: a control string in it, such as ``</s>``, becomes no control id.
"""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

try:
    import sentencepiece
except ImportError:
    sentencepiece = None  # type: ignore[assignment]

MODEL = "tokenizer.model"


class ChiarTokenizer(PreTrainedTokenizer):
    """The tokenizer of a model; nothing is added to the ids of a text but the token that begins documents.

    Args:
        vocab_file: path of the SentencePiece model.
        guarded: strings that would be encoded as control tokens, inside which a text is cut.
        prepend_bos: whether each text begins with ``bos_token``, as the documents of the training did.
        settings: of the library, such as ``eos_token``.

    Raises:
        ImportError: sentencepiece is not installed.
    """

    vocab_files_names = {"vocab_file": MODEL}  # noqa: RUF012 (the library's own name)
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, vocab_file: str, guarded: tuple[str, ...] = (), prepend_bos: bool = False, **settings: Any):
        if sentencepiece is None:
            raise ImportError("this tokenizer needs sentencepiece: pip install sentencepiece")
        self.vocab_file = vocab_file
        self._processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        self._guarded_tokens = frozenset(guarded)
        self._pattern = re.compile("|".join(map(re.escape, sorted(guarded, key=len, reverse=True))) or r"(?!)")
        self.prepend_bos = prepend_bos
        super().__init__(guarded=list(guarded), prepend_bos=prepend_bos, **settings)

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return self._processor.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each token."""
        known = {self._processor.id_to_piece(index): index for index in range(self.vocab_size)}
        return known | self.added_tokens_encoder

    def tokenize(self, text: str, **_: Any) -> list[str]:
        """Return the tokens of a text, which is cut inside guarded strings where one of them became a token."""
        pieces = self._processor.encode(text, out_type=str)
        if self._guarded_tokens.isdisjoint(pieces):
            return pieces
        cuts = [0, *(match.start() + 1 for match in self._pattern.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in itertools.pairwise(cuts) if start < end]
        return [piece for part in parts for piece in self._processor.encode(part, out_type=str)]

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return self.tokenize(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._processor.id_to_piece(index) if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of tokens. Special tokens of the settings are written out, other control tokens left out.

        ``decode(..., skip_special_tokens=True)`` takes the special ones away before.
        """
        special = set(self.all_special_tokens)
        parts: list[str] = []
        for is_special, group in itertools.groupby(tokens, special.__contains__):
            if is_special:
                parts.extend(group)
            else:
                parts.append(self._processor.decode([self._convert_token_to_id(token) for token in group]))
        return "".join(parts)

    def build_inputs_with_special_tokens(self, first: list[int], second: list[int] | None = None) -> list[int]:
        """Return the ids of one text or two, behind the token that begins documents if they have one."""
        return ([self.bos_token_id] if self.prepend_bos else []) + first + (second or [])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copy the SentencePiece model into a folder, and return its path."""
        path = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{MODEL}"
        if path.resolve() != Path(self.vocab_file).resolve():
            shutil.copyfile(self.vocab_file, path)
        return (str(path),)
