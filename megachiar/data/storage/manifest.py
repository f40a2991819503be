"""Record the sources, the tokenizer, the classes and the checksums of a dataset in its manifest, ``PREFIX.json``.

The indexed format itself names neither a tokenizer nor a checksum. A dataset without a manifest (made by Megatron)
works; ``megachiar inspect`` lists what cannot be checked then.

pydantic checks a manifest that is read. Its import takes longer than tokenizing a small corpus, so it is imported where
a manifest is read, not where one is written.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from megachiar.data.storage.files import (
    CHECKSUM_BLOCK,
    bin_path,
    block_checksums,
    idx_path,
    labels_path,
    manifest_path,
    write_atomically,
)
from megachiar.data.storage.reader import IndexedDataset
from megachiar.data.storage.regular_file import check_regular, read_regular
from megachiar.data.storage.sealed_json import parse_sealed, pretty_sealed
from megachiar.data.storage.tokenizer_record import TokenizerRecord
from megachiar.errors import UserError, disk_errors

FORMAT_VERSION: Final = 2
VERIFYING_THREADS = 4
LABELS_HEADER_BYTES: Final = 128  # of PREFIX.labels.npy, see ``labels.py``
_SHA256 = re.compile(r"[0-9a-f]{64}")
_STRICT = {"extra": "forbid"}  # for pydantic: a key that is not known is refused


@dataclass(frozen=True, kw_only=True)
class Checksums:
    """Hold the SHA-256 of each block of ``PREFIX.bin`` and ``PREFIX.idx``.

    Attributes:
        block_bytes: bytes of a block; the last block of a file may be shorter.
        bin, idx: hexadecimal digests of the blocks of each file, in order.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    block_bytes: Literal[67108864] = CHECKSUM_BLOCK
    bin: list[str]
    idx: list[str]

    def __post_init__(self) -> None:
        _check_digests([*self.bin, *self.idx])


@dataclass(frozen=True, kw_only=True)
class LabelsRecord:
    """Describe ``PREFIX.labels.npy``, which holds the class of each document of a labelled dataset.

    Attributes:
        classes: the name of each class; a class's number is its place in this list.
        checksums: hexadecimal digests of the blocks of the file, see ``Checksums``.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    classes: list[str]
    checksums: list[str]

    def __post_init__(self) -> None:
        _check_digests(self.checksums)
        if problem := problem_of_classes(self.classes):
            raise ValueError(problem)


def problem_of_classes(classes: Sequence[str]) -> str:
    """Say why ``classes`` cannot be the names of classes; the text is empty where they can."""
    if not classes:
        return "there is no class"
    seen: set[str] = set()
    for name in classes:
        if not name.strip() or not name.isprintable():
            return f"the class name {name[:80]!r} is empty or cannot be printed"
        if name in seen:
            return f"the class name {name[:80]!r} occurs twice"
        seen.add(name)
    return ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Hold the content of ``PREFIX.json``.

    Attributes:
        format_version: the version of this record.
        tokenizer: the tokenizer that made the tokens.
        dtype: numpy name of the stored type, such as ``uint16``.
        append_eod: whether each document ends with the tokenizer's ``eod_id``.
        documents, tokens: how many the dataset holds.
        text_bytes: UTF-8 bytes of the documents' text: the denominator of bits per byte.
        words: whitespace-separated words of the text: the denominator of word perplexity.
        skipped: reason -> number of documents left out by the whole run, whichever part of a split this dataset is.
        replaced: number of documents, likewise, in which bytes that are not UTF-8 were replaced.
        largest_token_id: the largest id that occurs.
        checksums: of both files, block by block.
        shuffle_seed: the seed that documents were shuffled by; None if they are in the order of the sources.
        sources: the names of the input files.
        source_bytes, source_checksums: the bytes on the disk and the checksum of each input file; empty in the
            manifests of earlier versions.
        parts: ``fingerprint`` of each dataset that this one was merged from; empty if it was not merged.
        options: the other options that the tokens depend on: how documents were found, and the split.
        labels: the classes of a labelled dataset; None for a dataset without labels.
        created_by: the tool and its version.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = _STRICT

    format_version: Literal[2] = FORMAT_VERSION
    tokenizer: TokenizerRecord
    dtype: str
    append_eod: bool
    documents: int
    tokens: int
    text_bytes: int
    words: int
    skipped: dict[str, int] = field(default_factory=dict)
    replaced: int = 0
    largest_token_id: int
    checksums: Checksums
    shuffle_seed: int | None = None
    sources: list[str] = field(default_factory=list)
    source_bytes: list[int] = field(default_factory=list)
    source_checksums: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)
    labels: LabelsRecord | None = None
    created_by: str

    def __post_init__(self) -> None:
        _check_at_least(self, documents=1, tokens=1, text_bytes=0, words=0, largest_token_id=0)

    @property
    def content(self) -> str:
        """Return ``"sha256:..."`` of what a run reads: the tokens; of a labelled dataset also index and labels."""
        return _digest_of(self.checksums.bin) if self.labels is None else self.fingerprint

    @property
    def fingerprint(self) -> str:
        """Return ``"sha256:..."`` of all files: two datasets with the same one hold the same documents and labels."""
        labels = [] if self.labels is None else self.labels.checksums
        return _digest_of([*self.checksums.bin, *self.checksums.idx, *labels])

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON can represent them; what earlier versions did not have is there where it is set."""
        values = {**asdict(self), "tokenizer": self.tokenizer.to_dict()}
        if self.labels is None:
            del values["labels"]
        if not self.replaced:
            del values["replaced"]
        return values

    def to_json(self) -> bytes:
        """Return the content of ``PREFIX.json``."""
        return pretty_sealed(self.to_dict())


def _digest_of(checksums: Sequence[str]) -> str:
    """Return ``"sha256:..."`` of the digests of blocks."""
    return f"sha256:{hashlib.sha256(bytes.fromhex(''.join(checksums))).hexdigest()}"


def _check_digests(digests: Sequence[str]) -> None:
    """Refuse what is no SHA-256."""
    for digest in digests:
        if not _SHA256.fullmatch(digest):
            raise ValueError(f"{digest[:80]!r} is no SHA-256 of 64 hexadecimal digits")


def _check_at_least(record: Any, **least: int) -> None:
    """Refuse a field of ``record`` that is below its smallest value."""
    for key, limit in least.items():
        if getattr(record, key) < limit:
            raise ValueError(f"{key} is {getattr(record, key)}, below {limit}")


def write_manifest(prefix: Path | str, manifest: Manifest) -> None:
    """Write ``PREFIX.json``, whole or not at all.

    Raises:
        UserError: the disk is full or read-only.
    """
    write_atomically(manifest_path(prefix), manifest.to_json())


def read_manifest(prefix: Path | str) -> Manifest | None:
    """Return the content of ``PREFIX.json``; None if there is no such file.

    Raises:
        UserError: the file cannot be read, is no manifest, or has a version that is not known.
    """
    path = manifest_path(prefix)
    with disk_errors(path, "read"):
        try:
            content = read_regular(path)
        except FileNotFoundError:
            if path.is_symlink():  # a link to nothing is no dataset without a manifest
                raise
            return None
    from pydantic import ValidationError

    try:
        return _schema().validate_python(parse_sealed(content))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
    except ValueError as error:
        problems = f"file: {error}"
    raise UserError(path, f"is not a manifest of version {FORMAT_VERSION}: {problems}", _WITHOUT_MANIFEST) from None


@functools.cache
def _schema() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


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
        manifest: its manifest, from ``read_manifest``.
        dataset: the dataset, if it is open already.
        verify: read both files whole and compare their checksums, not only type and counts.
        on_bytes: called with the number of bytes of each read while verifying.

    Raises:
        UserError: something does not fit; the message names the value in the manifest and the one found.
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
    if manifest.labels is not None:
        check_labels_size(prefix, manifest.documents)
    if verify:
        for path, checksums in recorded_checksums(prefix, manifest):
            compare_checksums(path, block_checksums(path, on_bytes, VERIFYING_THREADS), checksums)
    _check_number_of_checksums(prefix, manifest)


def recorded_checksums(prefix: Path | str, manifest: Manifest) -> list[tuple[Path, list[str]]]:
    """Return every file that a manifest has checksums of, with these; the labels last, if there are any."""
    files = [(idx_path(prefix), manifest.checksums.idx), (bin_path(prefix), manifest.checksums.bin)]
    return files if manifest.labels is None else [*files, (labels_path(prefix), manifest.labels.checksums)]


def check_labels_size(prefix: Path | str, documents: int) -> None:
    """Check that the labels of a labelled dataset are there, and as many as its documents.

    Raises:
        UserError: the file is missing, no regular file, or of another size.
    """
    path, expected = labels_path(prefix), LABELS_HEADER_BYTES + 4 * documents
    if not os.path.lexists(path):
        raise UserError(
            path,
            "the file does not exist, but the manifest beside it tells of labels",
            "a labelled dataset is four files: copy .bin, .idx, .json and .labels.npy together, or preprocess again",
        )
    with disk_errors(path, "read"):
        check_regular(path)
        size = path.stat().st_size
    if size != expected:
        raise UserError(
            path,
            f"has {size:,} bytes, but the labels of {documents:,} documents take {expected:,}",
            "the file was cut short or belongs to another dataset: copy it again or preprocess again",
        )


def _check_number_of_checksums(prefix: Path | str, manifest: Manifest) -> None:
    """Check that every block of each file has a checksum; ``data.verify`` would pass over a block without one."""
    for path, recorded in recorded_checksums(prefix, manifest):
        blocks = -(-path.stat().st_size // CHECKSUM_BLOCK)
        if len(recorded) != blocks:
            raise UserError(
                manifest_path(prefix),
                f"records {len(recorded)} checksums of {path.name}, but the file has {blocks} blocks of 64 MiB",
                f"the manifest belongs to other files. {_WITHOUT_MANIFEST}",
            )


def compare_checksums(path: Path, computed: list[str], recorded: list[str]) -> None:
    """Check that a file's blocks are those that its manifest records.

    Raises:
        UserError: they are not; the message names the bytes of the first block that differs.
    """
    if computed == recorded:
        return
    pairs = itertools.zip_longest(computed, recorded, fillvalue="nothing")
    number, (found, expected) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
    raise altered_block(path, number, found, expected)


def altered_block(path: Path, number: int, found: str, expected: str) -> UserError:
    """Return the error for block ``number`` of a file, which has another checksum than its manifest records."""
    first = number * CHECKSUM_BLOCK
    return UserError(
        path,
        f"bytes {first:,} to {first + CHECKSUM_BLOCK - 1:,} (or the end) have checksum {found}, but its manifest "
        f"records {expected}",
        "the file was damaged or replaced: copy it again or preprocess again",
    )


def check_same_tokenizer(datasets: Sequence[tuple[Path | str, Manifest | None]]) -> None:
    """Check that all datasets that have a manifest were made with the same tokenizer.

    Raises:
        UserError: two of them were made with different tokenizers.
    """
    known = [(prefix, manifest.tokenizer) for prefix, manifest in datasets if manifest is not None]
    for prefix, tokenizer in known[1:]:
        first_prefix, first = known[0]
        if tokenizer.fingerprint != first.fingerprint:
            raise UserError(
                prefix,
                f"was made with tokenizer {tokenizer.file} ({tokenizer.fingerprint}), but {first_prefix} with "
                f"{first.file} ({first.fingerprint})",
                "preprocess both with the same tokenizer",
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
