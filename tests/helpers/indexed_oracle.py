"""Indexed datasets and manifests for tests, packed with struct, so that they do not depend on the code under test."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megachiar.data.storage.manifest import Checksums, Manifest, TokenizerRecord, write_manifest

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
LETTERS = {
    "uint8": "B", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "float64": "d", "float32": "f", "uint16": "H",
}  # fmt: skip


def pack(documents: Sequence[Sequence[Sequence[float]]], dtype: str) -> tuple[bytes, bytes]:
    """Return the content of .bin and .idx for documents, which are sequences of lists of tokens."""
    letter = LETTERS[dtype]
    stream, lengths, pointers, starts = b"", [], [], [0]
    for document in documents:
        for sequence in document:
            pointers.append(len(stream))
            lengths.append(len(sequence))
            stream += struct.pack(f"<{len(sequence)}{letter}", *sequence)
        starts.append(len(lengths))
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", CODES[dtype])
    index += struct.pack("<QQ", len(lengths), len(starts))
    index += struct.pack(f"<{len(lengths)}i", *lengths)
    index += struct.pack(f"<{len(pointers)}q", *pointers)
    index += struct.pack(f"<{len(starts)}q", *starts)
    return stream, index


def write(prefix: Path, documents: Sequence[Sequence[Sequence[float]]], dtype: str = "uint16") -> Path:
    """Write a dataset and return its prefix."""
    stream, index = pack(documents, dtype)
    Path(f"{prefix}.bin").write_bytes(stream)
    Path(f"{prefix}.idx").write_bytes(index)
    return prefix


def write_stream(prefix: Path, tokens: np.ndarray, dtype: str = "uint16", documents: int = 1) -> Path:
    """Write ``tokens`` as so many ``documents`` of about equal size, and return the prefix."""
    return write(prefix, [[part.tolist()] for part in np.array_split(tokens, documents)], dtype)


def random_documents(rng: np.random.Generator, dtype: str, count: int) -> list[list[list[float]]]:
    """Return documents of 1 to 3 sequences of 0 to 19 tokens over the whole range of the dtype.

    One more document holds the extremes of the dtype.
    """
    kind = np.dtype(dtype)
    documents = []
    for _ in range(count):
        lengths = rng.integers(0, 20, rng.integers(1, 4))
        if kind.kind == "f":
            documents.append([rng.standard_normal(n).astype(kind).tolist() for n in lengths])
        else:
            limits = np.iinfo(kind)
            documents.append(
                [rng.integers(limits.min, limits.max, n, dtype=kind, endpoint=True).tolist() for n in lengths]
            )
    extremes = [0.5, -2.0] if kind.kind == "f" else [int(np.iinfo(kind).min), int(np.iinfo(kind).max)]
    return [*documents, [extremes]]


def checksums_of(content: bytes) -> list[str]:
    """Return the checksums of a file of at most 64 MiB."""
    return [hashlib.sha256(content).hexdigest()] if content else []


def make_manifest(prefix: Path, **changes: object) -> Manifest:
    """Write a correct manifest for the dataset at ``prefix``, apart from ``changes``, and return it."""
    from megachiar.data.storage.reader import IndexedDataset

    dataset = IndexedDataset(prefix)
    tokenizer = {"kind": "gpt2", "file": "vocab", "fingerprint": "sha256:aa", "vocab_size": 300, "eod_id": 0}
    for key in tuple(changes):
        if key in tokenizer:
            tokenizer[key] = changes.pop(key)
    values = {
        "tokenizer": TokenizerRecord(**tokenizer),
        "dtype": dataset.dtype.name,
        "append_eod": True,
        "documents": dataset.documents,
        "tokens": int(dataset.tokens.size),
        "text_bytes": 5 * int(dataset.tokens.size),
        "words": int(dataset.tokens.size),
        "skipped": {"empty": 2},
        "largest_token_id": int(dataset.tokens.max()),
        "checksums": Checksums(
            **{key: [hashlib.sha256(Path(f"{prefix}.{key}").read_bytes()).hexdigest()] for key in ("bin", "idx")}
        ),
        "sources": [f"{Path(prefix).name}.txt"],
        "created_by": "test",
    }
    manifest = Manifest(**{**values, **changes})
    write_manifest(prefix, manifest)
    return manifest
