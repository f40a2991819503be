"""Tokenize with a Hugging Face ``tokenizer.json``, or with GPT-2's files, through the ``tokenizers`` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megachiar.data.tokenizers.control_guard import ControlGuard, any_of
from megachiar.data.tokenizers.edge_tokens import BOS_STRINGS, EOD_STRINGS, EdgeToken, EdgeTokens, first_special
from megachiar.data.tokenizers.gpt2_files import GPT2_EOD, parse_merges, parse_vocabulary
from megachiar.data.tokenizers.unsupported import refuse_unsupported
from megachiar.data.tokenizers.vocabulary_files import fingerprint, read_file, vocabulary_files
from megachiar.errors import UserError


class HuggingFaceTokenizer:
    """Tokenize with the ``tokenizers`` library; ``tokenizer.Tokenizer`` describes attributes and methods.

    Attributes:
        uses_gpt2_words: the text is cut into words by GPT-2's expression alone, and each word is encoded by itself.

    Args:
        kind: ``"huggingface"`` or ``"gpt2"``.
        path: the file or folder it was loaded from, for errors.
        tokenizer: a ``tokenizers.Tokenizer``, which this object owns from now on.
        contents: the contents of its files.
        edges: the tokens at the edges of documents; where nobody names one, it is the first of ``EOD_STRINGS`` or
            ``BOS_STRINGS`` that the vocabulary has.

    Raises:
        UserError: the vocabulary is empty, lacks a token that is named, or would lose bytes of the text.
    """

    def __init__(self, kind: str, path: Path, tokenizer: Any, contents: list[bytes], edges: EdgeTokens):
        self.kind = kind
        self.path = path
        self._tokenizer = tokenizer
        self.fingerprint = fingerprint(contents)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(path, "the vocabulary is empty", "give a trained tokenizer")
        self.vocab_size: int = max(vocabulary.values()) + 1
        _check_loses_no_bytes(path, tokenizer, vocabulary)
        special_strings = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        self.eod_id = edges.eod.find(path, vocabulary, "end")
        if self.eod_id is None:
            self.eod_id = first_special(EOD_STRINGS, special_strings, vocabulary)
        self.eod_named_by = edges.eod.named_by
        self.bos_id = None if edges.bos is None else edges.bos.find(path, vocabulary, "beginning")
        if edges.bos is not None and self.bos_id is None:
            self.bos_id = first_special(BOS_STRINGS, special_strings, vocabulary)
        self._make_plain()
        self.uses_gpt2_words = _uses_gpt2_words(tokenizer)
        self.unknown_id = _unknown_id(tokenizer.model, vocabulary)  # it may stand for any character
        added = tokenizer.get_added_tokens_decoder()
        special: dict[int, str] = {index: token.content for index, token in added.items() if token.special}
        self.controls = {index: content for index, content in special.items() if index != self.unknown_id}
        self._guard = ControlGuard(path, self.controls, self._encode_plain)

    @classmethod
    def load(cls, path: Path, edges: EdgeTokens) -> HuggingFaceTokenizer:
        """Load a ``tokenizer.json``, or the one in the folder ``path``."""
        import tokenizers

        (file,) = vocabulary_files(path, "huggingface")
        content = read_file(file)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            refuse_unsupported(file, content)
            raise UserError(
                file, f"is not a Hugging Face tokenizer: {error}", "give the tokenizer.json its trainer wrote"
            ) from error
        return cls("huggingface", file, tokenizer, [content], edges)

    @classmethod
    def load_gpt2(cls, path: Path, edges: EdgeTokens) -> HuggingFaceTokenizer:
        """Load GPT-2's vocabulary and merges from the folder ``path``, or from the folder of the file ``path``."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        vocabulary_file, merges_file = vocabulary_files(path, "gpt2")
        contents = [read_file(vocabulary_file), read_file(merges_file)]
        vocabulary = parse_vocabulary(vocabulary_file, contents[0])
        merges = parse_merges(merges_file, contents[1])
        try:
            tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                merges_file, f"does not fit {vocabulary_file.name}: {error}", "take both files from the same tokenizer"
            ) from error
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        if GPT2_EOD in vocabulary:
            own = EdgeToken(GPT2_EOD)  # the files do not say that it is a special token
            bos = own if edges.bos is not None and edges.bos.token is None else edges.bos
            edges = EdgeTokens(own if edges.eod.token is None else edges.eod, bos)
        return cls("gpt2", vocabulary_file.parent, tokenizer, contents, edges)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return list(map(self._guard.clean, texts, self._encode_plain(texts)))

    def definition(self) -> str:
        """Return a ``tokenizer.json`` of the tokenizer as it encodes here."""
        return self._tokenizer.to_str()

    def control_pattern(self) -> re.Pattern[str]:
        added = [token for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        if self._tokenizer.normalizer is not None and any(token.normalized for token in added):
            return re.compile("")  # the library looks for these in the normalized text: other strings may become one
        return any_of(token.content for token in added)

    def encode_with_controls(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = False
        try:
            return self._encode_plain([text])[0]
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(index) for index in ids], skip_special_tokens=True)

    def known_ids(self) -> list[int]:
        return sorted(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def _encode_plain(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _make_plain(self) -> None:
        """Turn off the settings of a tokenizer file that would add, drop or change tokens of a document."""
        from tokenizers import AddedToken

        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None) is not None:
            self._tokenizer.model.dropout = None  # BPE dropout draws: the same text would give other ids each time
        for index in dict.fromkeys((self.eod_id, self.bos_id)):
            if index is not None:
                edge = AddedToken(self._tokenizer.id_to_token(index), special=True, normalized=False)
                self._tokenizer.add_special_tokens([edge])
        self._tokenizer.encode_special_tokens = True  # the library's name for encoding them as ordinary text


def _unknown_id(model: Any, vocabulary: dict[str, int]) -> int | None:
    """Return the id that a model of ``tokenizers`` gives to an unknown character; None if it has none."""
    if hasattr(model, "unk_token"):
        return vocabulary.get(model.unk_token)
    return json.loads(model.__getstate__()).get("unk_id")  # a unigram model says it nowhere else


def _uses_gpt2_words(tokenizer: Any) -> bool:
    """Return whether GPT-2's expression alone cuts the text into words, and a BPE encodes each word by itself."""
    from tokenizers import models, pre_tokenizers

    pre_tokenizer, added = tokenizer.pre_tokenizer, tokenizer.get_added_tokens_decoder().values()
    return (
        isinstance(tokenizer.model, models.BPE)
        and isinstance(pre_tokenizer, pre_tokenizers.ByteLevel)
        and pre_tokenizer.use_regex
        and not pre_tokenizer.add_prefix_space
        and tokenizer.normalizer is None
        and all(token.special for token in added)  # special tokens are not looked for in a text
    )


def _check_loses_no_bytes(path: Path, tokenizer: Any, vocabulary: dict[str, int]) -> None:
    """Refuse a byte-level BPE whose vocabulary lacks bytes: the library would drop them from text without a word."""
    from tokenizers import models, pre_tokenizers

    model = tokenizer.model
    parts = [part.__getstate__() for part in (tokenizer.pre_tokenizer, tokenizer.normalizer) if part is not None]
    if not isinstance(model, models.BPE) or not any(b'"ByteLevel"' in part for part in parts):
        return
    if model.unk_token or model.byte_fallback:
        return
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys()
    if missing:
        raise UserError(
            path,
            f"the byte-level vocabulary lacks {len(missing)} of the 256 bytes: text with them would lose characters",
            "train it with the whole byte alphabet, as `megachiar tokenizer` does",
        )
