"""Tokenizers behind one interface: SentencePiece, Hugging Face ``tokenizer.json`` and GPT-2's byte-level BPE.

The libraries (``sentencepiece``, ``tokenizers``) are the reference: token ids are theirs, with one exception that holds
for all tokenizers. Text stays text: a control string that occurs in a document (``<s>``, ``<|endoftext|>``) is encoded
as the characters it is made of. It never becomes a control id, or a web page could end a document or start a chat turn.
``encode_with_controls`` is for texts that hold them on purpose.

Nothing is added to the ids of a text (no BOS, no EOS) and nothing is cut off, whatever the tokenizer's own file asks
for.

    tokenizer.py              the interface, and how a tokenizer is loaded
    vocabulary_files.py       which files a tokenizer consists of, their kind and fingerprint
    sentencepiece_model.py    the reference for SentencePiece          control_guard.py   keeps control ids out of text
    huggingface_model.py      the reference for tokenizer.json, GPT-2  gpt2_files.py      GPT-2's vocabulary and merges
    fast.py                   gigatoken, proved equal to a reference   pieces.py          a reference with a cache
    unsupported.py            files that are no usable tokenizer       recorded.py        the tokenizer of a dataset
    edge_tokens.py            what begins and ends a document          hub.py             tokenizers on the hub
    control_text.py           control tokens in text, where allowed
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megachiar.data.tokenizers.edge_tokens import EdgeTokens, edge_tokens
from megachiar.data.tokenizers.gpt2_files import check_gpt2_rules
from megachiar.data.tokenizers.hub import local_tokenizer
from megachiar.data.tokenizers.huggingface_model import HuggingFaceTokenizer
from megachiar.data.tokenizers.sentencepiece_model import SentencePieceTokenizer
from megachiar.data.tokenizers.vocabulary_files import resolve_kind

TokenIds = Sequence[int] | np.ndarray[Any, np.dtype[Any]]
"""Token ids of one text: a list, or an integer array of shape (n,)."""


class Tokenizer(Protocol):
    """The interface of every tokenizer.

    Attributes:
        kind: ``"sentencepiece"``, ``"huggingface"`` or ``"gpt2"``.
        path: the file or folder it was loaded from.
        vocab_size: the largest id that can occur, plus one.
        eod_id: the id of the end-of-document token; None where the vocabulary has none.
        bos_id: the id of the token that documents begin with; None where they begin with their text.
        unknown_id: the id of the unknown token, for text that the vocabulary lacks; None where there is none.
        fingerprint: ``"sha256:..."`` of the vocabulary file(s); equal fingerprints give equal ids.
        controls: id -> string of the tokens that never stand for text.
    """

    kind: str
    path: Path
    vocab_size: int
    eod_id: int | None
    bos_id: int | None
    unknown_id: int | None
    fingerprint: str
    controls: dict[int, str]

    def encode(self, text: str) -> TokenIds:
        """Return the token ids of one text."""
        ...

    def encode_batch(self, texts: list[str]) -> Sequence[TokenIds]:
        """Return the token ids of every text, each as ``encode`` gives them."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; control tokens are left out."""
        ...

    def known_ids(self) -> Sequence[int]:
        """Return every id that has a token, in ascending order; a vocabulary may have holes below ``vocab_size``."""
        ...


class ReferenceTokenizer(Tokenizer, Protocol):
    """A tokenizer whose ids are the library's own, which a faster one is compared with.

    Attributes:
        eod_named_by: who names the end-of-document token; empty where nobody does, so that it is the library's own.
    """

    eod_named_by: str

    def definition(self) -> str | bytes:
        """Return the SentencePiece model or tokenizer.json that another library can build the same tokenizer from."""
        ...

    def control_pattern(self) -> re.Pattern[str]:
        """Return an expression that matches in each text that may hold the string of a control token."""
        ...

    def encode_with_controls(self, text: str) -> TokenIds:
        """Return the ids of a text in which the strings of control tokens stand for these tokens."""
        ...


def load_tokenizer(
    path: Path | str,
    kind: str = "auto",
    eod_token: str | int | None = None,
    *,
    prepend_bos: bool = False,
    bos_token: str | int | None = None,
) -> ReferenceTokenizer:
    """Load the tokenizer at ``path``.

    Args:
        path: ``hf:NAME`` or ``hf:NAME@REVISION`` on the Hugging Face hub; ``*.model`` (SentencePiece); ``*.json`` or a
            folder with ``tokenizer.json`` (Hugging Face); a folder with ``vocab.json`` and ``merges.txt``, or
            ``encoder.json`` and ``vocab.bpe``, or one of these files (GPT-2).
        kind: one of ``TokenizerKind``; ``"auto"`` goes by the names of the files.
        eod_token: the token that ends a document, as a string or an id; it replaces ``eos_token`` of the
            tokenizer_config.json beside the files, and the tokenizer's own.
        prepend_bos: whether documents begin with a token of their own.
        bos_token: the token that begins a document then, as ``eod_token``.

    Raises:
        UserError: there is no such file, the file is not a tokenizer, or a token that is named is not in its
            vocabulary.
    """
    path = local_tokenizer(path)
    resolved = resolve_kind(path, kind)
    if kind == "auto" and resolved == "gpt2":  # only the names of the files say so; a kind that was named is believed
        check_gpt2_rules(path)
    loaders: dict[str, Callable[[Path, EdgeTokens], ReferenceTokenizer]] = {
        "sentencepiece": SentencePieceTokenizer.load,
        "huggingface": HuggingFaceTokenizer.load,
        "gpt2": HuggingFaceTokenizer.load_gpt2,
    }
    return loaders[resolved](path, edge_tokens(path, eod_token, bos_token, prepend_bos=prepend_bos))
