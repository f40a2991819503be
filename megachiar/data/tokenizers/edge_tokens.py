"""Say which tokens stand at the edges of a document, and who named them.

The token that ends a document is the one that the user names, or ``eos_token`` of a ``tokenizer_config.json`` beside
the vocabulary, or the tokenizer's own. The token that begins a document, where documents have one, is found in the same
order, with ``bos_token``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_json
from megachiar.errors import UserError

SETTINGS_FILE = "tokenizer_config.json"
EOD_STRINGS = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)
"""Tokens that end a document where nothing names one: the first that a vocabulary has as a special token."""
BOS_STRINGS = (
    "<|endoftext|>",
    "<s>",
    "<|begin_of_text|>",
    "<bos>",
    "<|bos|>",
    "[BOS]",
    "<｜begin▁of▁sentence｜>",
    "[CLS]",
)
"""Tokens that begin a document where nothing names one, as ``EOD_STRINGS``; GPT-2 has one token for both."""


class EdgeToken(NamedTuple):
    """Name a token at the edge of a document.

    Attributes:
        token: its string or id; None takes the tokenizer's own, if it has one.
        named_by: who names it, for a message; empty where nobody does.
    """

    token: str | int | None = None
    named_by: str = ""

    def find(self, path: Path, vocabulary: Mapping[str, int], which: str) -> int | None:
        """Return the id of the token; None where nobody names it.

        Args:
            path: the tokenizer's file, for the error.
            vocabulary: token -> id.
            which: ``end`` or ``beginning`` of a document.

        Raises:
            UserError: ``vocabulary`` does not have the token.
        """
        token = self.token
        if token is None:
            return None
        is_there = token in vocabulary if isinstance(token, str) else token in vocabulary.values()
        if not is_there:
            raise UserError(
                path,
                f"the {which}-of-document token {token!r} ({self.named_by}) is not in the vocabulary",
                f"name a token that the vocabulary has with {_OPTIONS[which]}",
            )
        return vocabulary[token] if isinstance(token, str) else token


_OPTIONS = {"end": "--eod-token", "beginning": "--bos-token"}


class EdgeTokens(NamedTuple):
    """Name the tokens at both edges of a document; without ``bos`` documents begin with their text."""

    eod: EdgeToken = EdgeToken()
    bos: EdgeToken | None = None


def edge_tokens(
    path: Path, eod_token: str | int | None, bos_token: str | int | None, *, prepend_bos: bool
) -> EdgeTokens:
    """Return the tokens at the edges of documents that are named for the tokenizer at ``path``.

    Args:
        path: the tokenizer's file or folder.
        eod_token: the token that ends a document, if the user or a record names one.
        bos_token: the token that begins a document, if the user or a record names one.
        prepend_bos: whether documents begin with a token of their own.

    Raises:
        UserError: the tokenizer_config.json beside the vocabulary cannot be read, or names something else than a token.
    """
    settings = _Settings(path) if eod_token is None or (prepend_bos and bos_token is None) else None

    def named(token: str | int | None, option: str, key: str) -> EdgeToken:
        if token is not None:
            return EdgeToken(token, option)
        return settings.token(key) if settings is not None else EdgeToken()

    eod = named(eod_token, "--eod-token", "eos_token")
    return EdgeTokens(eod, named(bos_token, "--bos-token", "bos_token") if prepend_bos else None)


def first_special(strings: Iterable[str], special: Iterable[str], vocabulary: Mapping[str, int]) -> int | None:
    """Return the id of the first of ``strings`` that is a special token; None if none is."""
    known = set(special)
    return next((vocabulary[token] for token in strings if token in known), None)


class _Settings:
    """Read the ``tokenizer_config.json`` beside the vocabulary at ``path``, if there is one.

    Raises:
        UserError: it cannot be read.
    """

    def __init__(self, path: Path):
        self._file = (path if path.is_dir() else path.parent) / SETTINGS_FILE
        self._values: Any = {}
        try:
            self._values = parse_json(read_regular(self._file))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise UserError(self._file, f"cannot read: {error.strerror}", "make it readable") from error
        except ValueError as error:
            raise UserError(self._file, f"holds broken JSON: {error}", "fetch it again, or take it away") from error
        if not isinstance(self._values, dict):
            raise UserError(self._file, "is no JSON object", "fetch it again, or take it away")

    def token(self, key: str) -> EdgeToken:
        """Return the token under ``key``, which is a string, or an object with the string under ``content``."""
        value = self._values.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if content is None and not isinstance(value, dict):
            return EdgeToken()
        if not isinstance(content, str) or not content:
            raise UserError(self._file, f"{key} is {value!r:.80}, not a token", f"name a token as a string under {key}")
        return EdgeToken(content, f"{key} of {SETTINGS_FILE}")
