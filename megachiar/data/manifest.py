"""The manifest ``PREFIX.json`` beside a dataset: what it was made of, with what, and checksums to prove it.

The indexed format itself knows neither its tokenizer nor a checksum. A dataset without a manifest (made by Megatron)
works; what cannot be checked then is listed by ``inspect_dataset``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megachiar.data.files import bin_path, checksum, idx_path, manifest_path, write_atomically
from megachiar.data.indexed import IndexedDataset
from megachiar.errors import UserError

FORMAT_VERSION = 1


class TokenizerRecord(BaseModel):
    """The tokenizer a dataset was made with.

    Attributes:
        kind: ``sentencepiece``, ``huggingface`` or ``gpt2``.
        file: where it was found when the dataset was made: absolute, or relative to the manifest's folder.
        fingerprint: ``"sha256:..."`` of the content of its vocabulary files.
        vocab_size: largest id that can occur, plus one.
        eod_id: id that ends a document, if it has one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    file: str
    fingerprint: str
    vocab_size: int = Field(gt=0)
    eod_id: int | None = None


class Manifest(BaseModel):
    """What ``PREFIX.json`` records.

    Attributes:
        format_version: of this record.
        tokenizer: what made the tokens.
        dtype: numpy name of the stored type, such as ``uint16``.
        append_eod: whether each document ends with the tokenizer's ``eod_id``.
        documents, tokens: how many the dataset holds.
        text_bytes: UTF-8 bytes of the documents' text: the denominator of bits per byte.
        words: whitespace-separated words of the text: the denominator of word perplexity.
        skipped: reason -> number of documents left out by the whole run, whichever part of a split this dataset is.
        largest_token_id: the largest id that occurs.
        checksums: ``bin`` and ``idx`` -> ``"sha256:..."`` of the file.
        sources: the input files.
        created_by: tool and version.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    tokenizer: TokenizerRecord
    dtype: str
    append_eod: bool
    documents: int = Field(gt=0)
    tokens: int = Field(gt=0)
    text_bytes: int = Field(ge=0)
    words: int = Field(ge=0)
    skipped: dict[str, int] = {}
    largest_token_id: int = Field(ge=0)
    checksums: dict[Literal["bin", "idx"], str]
    sources: list[str] = []
    created_by: str


def write_manifest(prefix: Path | str, manifest: Manifest) -> None:
    """Write ``PREFIX.json``, whole or not at all.

    Raises:
        UserError: the disk is full or read-only.
    """
    content = json.dumps(manifest.model_dump(), indent=2, ensure_ascii=False) + "\n"
    write_atomically(manifest_path(prefix), content.encode())


def read_manifest(prefix: Path | str) -> Manifest | None:
    """Read ``PREFIX.json``; None if there is none.

    Raises:
        UserError: the file is no manifest, or of a version that is not known.
    """
    path = manifest_path(prefix)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(path, f"cannot read the manifest: {error.strerror}", "make it readable") from None
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise UserError(path, f"not a manifest of version {FORMAT_VERSION}: {problems}", _WITHOUT_MANIFEST) from None


_WITHOUT_MANIFEST = "preprocess again, or remove the file to use the dataset without the checks it allows"


def check_manifest(
    prefix: Path | str,
    manifest: Manifest,
    dataset: IndexedDataset | None = None,
    *,
    verify: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Check that the files beside a manifest are the ones it describes.

    Args:
        prefix: path of the dataset.
        manifest: what ``read_manifest`` returned.
        dataset: the dataset if it is open already.
        verify: read both files whole and compare their checksums, not only type and counts.
        on_bytes: called with the size of each block read while verifying.

    Raises:
        UserError: something does not fit; it names the value in the manifest and the one found.
    """
    dataset = dataset or IndexedDataset(prefix)
    found = {"dtype": dataset.dtype.name, "documents": dataset.documents, "tokens": dataset.tokens.size}
    for key, value in found.items():
        recorded = getattr(manifest, key)
        if recorded != value:
            raise UserError(
                manifest_path(prefix),
                f"records {key} {recorded}, but the files hold {value}",
                f"the manifest belongs to other files. {_WITHOUT_MANIFEST}",
            )
    if verify:
        _check_checksums(prefix, manifest, on_bytes)


def _check_checksums(prefix: Path | str, manifest: Manifest, on_bytes: Callable[[int], None] | None) -> None:
    for key, path in (("idx", idx_path(prefix)), ("bin", bin_path(prefix))):
        recorded = manifest.checksums.get(key)
        if recorded is None:
            raise UserError(manifest_path(prefix), f"records no checksum of {path.name}", "preprocess again")
        computed = checksum(path, on_bytes)
        if computed != recorded:
            raise UserError(
                path,
                f"its content has {computed}, but {manifest_path(prefix).name} records {recorded}",
                "the file was damaged or replaced: copy it again or preprocess again",
            )


def check_vocabulary(prefix: Path | str, manifest: Manifest, vocab_size: int) -> None:
    """Check that a model with ``vocab_size`` rows of embedding can read every id of the dataset and its tokenizer.

    Raises:
        UserError: the tokenizer's vocabulary, or an id that occurs, is larger than the model's.
    """
    needed = max(manifest.tokenizer.vocab_size, manifest.largest_token_id + 1)
    if needed > vocab_size:
        raise UserError(
            manifest_path(prefix),
            f"the dataset's tokenizer has {manifest.tokenizer.vocab_size:,} ids (largest stored: "
            f"{manifest.largest_token_id:,}), the model only {vocab_size:,}",
            f"set model.vocab_size to at least {needed:,}, or preprocess with the model's tokenizer",
        )


def check_tokenizer(prefix: Path | str, manifest: Manifest, fingerprint: str) -> None:
    """Check that the dataset was made with the tokenizer of this fingerprint.

    Raises:
        UserError: it was made with another one.
    """
    if manifest.tokenizer.fingerprint != fingerprint:
        raise UserError(
            manifest_path(prefix),
            f"made with tokenizer {manifest.tokenizer.file} ({manifest.tokenizer.fingerprint}), "
            f"but the one given has {fingerprint}",
            "give the tokenizer the dataset was made with, or preprocess again",
        )
