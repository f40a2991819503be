"""Find the files that a tokenizer consists of, tell which kind it is, and compute its fingerprint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import get_args

from megachiar.data.storage.regular_file import read_regular
from megachiar.data.tokenizers.choices import TokenizerKind
from megachiar.data.tokenizers.hub import HUB_PREFIX, NAME
from megachiar.data.tokenizers.unsupported import find_unsupported_file, refuse_unsupported
from megachiar.errors import UserError

GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def vocabulary_files(path: Path, kind: str) -> list[Path]:
    """Return the files that the tokenizer of this kind at ``path``, a file or a folder, consists of.

    Raises:
        UserError: there is no such tokenizer.
    """
    kind = resolve_kind(path, kind)
    if kind == "gpt2":
        return list(gpt2_files(path if path.is_dir() else path.parent))
    if path.is_dir():
        return [_single_model(path) if kind == "sentencepiece" else path / "tokenizer.json"]
    return [path]


def tokenizer_fingerprint(path: Path, kind: str) -> str:
    """Return the ``fingerprint`` of the tokenizer of this kind at ``path``, without loading it.

    Raises:
        UserError: there is no such tokenizer.
    """
    return fingerprint([read_file(file) for file in vocabulary_files(path, kind)])


def _how_to_get(path: Path) -> str:
    """Return the remedy for a ``path`` that does not exist and may be meant as a name on Hugging Face's hub."""
    name, expected = str(path), "check the path of the file or folder"
    if NAME.fullmatch(name) is None or path.suffix in (".model", ".json"):
        return expected
    return f"{expected}; if this is a name on the Hugging Face hub, write {HUB_PREFIX}{name}, which fetches it"


def resolve_kind(path: Path, kind: str) -> str:
    """Return ``kind`` itself, or, where it is ``"auto"``, the kind that the names of the files at ``path`` tell.

    Raises:
        UserError: ``path`` does not exist, ``kind`` is not one of ``TokenizerKind``, or the names tell no kind.
    """
    if not path.exists():
        raise UserError(path, "there is no such tokenizer file or folder", _how_to_get(path))
    known = get_args(TokenizerKind)
    if kind not in known:
        raise UserError(path, f"unknown tokenizer kind {kind!r}", f"use one of {', '.join(known)}")
    return _kind_by_names(path) if kind == "auto" else kind


def gpt2_files(folder: Path) -> tuple[Path, Path]:
    """Return the vocabulary and the merges of the GPT-2 tokenizer in ``folder``.

    Raises:
        UserError: ``folder`` has no such pair of files.
    """
    for vocabulary, merges in GPT2_FILES:
        if (folder / vocabulary).exists() and (folder / merges).exists():
            return folder / vocabulary, folder / merges
    wanted = " or ".join(f"{vocabulary} with {merges}" for vocabulary, merges in GPT2_FILES)
    raise UserError(folder, f"a GPT-2 tokenizer needs {wanted}", "put both files into one folder")


def read_file(path: Path) -> bytes:
    """Return the content of a tokenizer's file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return read_regular(path)
    except OSError as error:
        raise UserError(
            path, f"cannot read the tokenizer: {error.strerror}", "check the path and its permissions"
        ) from error


def fingerprint(contents: list[bytes]) -> str:
    """Return ``sha256:...`` of one file as ``sha256sum`` prints it; of several files it is the hash of their hashes."""
    digests = [hashlib.sha256(content) for content in contents]
    whole = digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digest.digest() for digest in digests))
    return f"sha256:{whole.hexdigest()}"


def _kind_by_names(path: Path) -> str:
    """Return the kind of the tokenizer at ``path`` by its name, or by the names of the files in the folder."""
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            return "huggingface"
        if any((path / vocabulary).exists() and (path / merges).exists() for vocabulary, merges in GPT2_FILES):
            return "gpt2"
        if any(path.glob("*.model")):
            return "sentencepiece"
    elif path.name in {name for pair in GPT2_FILES for name in pair}:
        return "gpt2"
    elif ".model" in path.suffixes:  # tokenizer.model.v3 too
        return "sentencepiece"
    elif path.suffix == ".json":
        return "huggingface"
    unsupported = find_unsupported_file(path) if path.is_dir() else path
    if unsupported is not None:
        refuse_unsupported(unsupported, read_file(unsupported))
    raise UserError(
        path,
        "cannot tell what kind of tokenizer this is",
        "give a SentencePiece *.model, a tokenizer.json or a folder holding one, or a folder with vocab.json and "
        "merges.txt; or name the kind",
    )


def _single_model(folder: Path) -> Path:
    """Return the SentencePiece model of ``folder``: ``tokenizer.model``, or its only ``*.model``."""
    models = sorted(folder.glob("*.model"))
    preferred = folder / "tokenizer.model"
    if preferred in models:
        return preferred
    if len(models) != 1:
        raise UserError(folder, f"holds {len(models)} *.model files, expected one", "give the path of the file itself")
    return models[0]
