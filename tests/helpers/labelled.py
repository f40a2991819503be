"""Labelled datasets that a model can learn, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import indexed_oracle as oracle
import numpy as np

from megachiar.data.storage.labels import write_labels
from megachiar.data.storage.writer import IndexedDatasetBuilder

CLASSES = ("slow", "fast", "faster")


def write_examples(
    prefix: Path,
    examples: int = 48,
    *,
    seed: int = 0,
    vocab_size: int = 64,
    longest: int = 40,
    classes: Sequence[str] = CLASSES,
) -> Path:
    """Write examples of 5 to ``longest`` tokens whose class is their stride, and return the prefix."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, len(classes), examples)
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        for number in numbers:
            length, start = rng.integers(5, longest + 1), rng.integers(vocab_size)
            builder.add_document(((start + (number + 1) * np.arange(length)) % vocab_size).astype(np.uint16))
    oracle.make_manifest(prefix, append_eod=False, vocab_size=vocab_size)
    write_labels(prefix, numbers, classes)
    return prefix
