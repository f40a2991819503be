"""What a model reads of a dataset to be measured: windows of a text, or examples as a classification reads them.

Shapes: n = windows or examples, T = sequence length.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from megachiar.config.tasks import MAIN_TASK
from megachiar.data.sampling.dataset import TokenSource, ValidationSet, token_blocks
from megachiar.data.sampling.examples import ExampleSet
from megachiar.model import ChiarFormer
from megachiar.model.classifier import real_lengths


class Windows(NamedTuple):
    """Windows of a text, or examples with their labels, as a model takes them.

    Attributes:
        inputs: int64 (n, T); of examples padded with -1.
        targets: int64 (n, T); of examples their labels (n,).
        numbers: of the windows or examples in their set, int64 (n,); they key random routes.
    """

    inputs: np.ndarray
    targets: np.ndarray
    numbers: np.ndarray

    @property
    def head(self) -> str | None:
        """The task whose classification head reads examples; None for windows of a text."""
        return MAIN_TASK if self.targets.ndim == 1 else None


def spread_windows(dataset: ValidationSet | ExampleSet, sequences: int) -> Windows:
    """Return full windows, or examples, spread evenly over the dataset, at most ``sequences`` of them.

    A text shorter than one window is returned whole, as one short window.
    """
    if isinstance(dataset, ExampleSet):
        numbers = np.unique(np.linspace(0, dataset.windows - 1, min(sequences, dataset.windows)).astype(np.int64))
        rows = np.concatenate([dataset.batch(number, number + 1) for number in numbers.tolist()])
        return Windows(rows[:, :-1], rows[:, -1], numbers)
    full = dataset.targets // dataset.sequence_length
    if full == 0:
        inputs, targets = dataset.batch(0, 1)
        return Windows(inputs[:, : dataset.targets], targets[:, : dataset.targets], np.zeros(1, np.int64))
    numbers = np.unique(np.linspace(0, full - 1, min(sequences, full)).astype(np.int64))
    inputs, targets = zip(*(dataset.batch(window, window + 1) for window in numbers.tolist()), strict=True)
    return Windows(np.concatenate(inputs), np.concatenate(targets), numbers)


def tokens_that_count(model: ChiarFormer, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens that a model reads, and which of them its statistics count.

    They leave out padding, unless the task counts it as token 0.

    Returns:
        int64 (n * T,) and bool (n * T,).
    """
    if windows.head is None:
        return windows.inputs.ravel(), np.ones(windows.inputs.size, bool)
    tokens, lengths = real_lengths(torch.from_numpy(windows.inputs), model.heads[windows.head])
    counts = np.ones(windows.inputs.shape, bool)
    if lengths is not None:
        counts = np.arange(windows.inputs.shape[1]) < lengths.numpy()[:, None]
    return tokens.numpy().ravel(), counts.ravel()


def token_counts(source: TokenSource, vocab_size: int, tokens: int) -> np.ndarray:
    """Return how often each id occurs among ``tokens`` tokens of a text, or in all of it, int64 (vocab_size,)."""
    counts = np.zeros(vocab_size, np.int64)
    for block in token_blocks(source, tokens):
        counts += np.bincount(block, minlength=vocab_size)
    return counts


def counts_of_examples(model: ChiarFormer, dataset: ExampleSet, tokens: int) -> np.ndarray:
    """Return how often each id occurs in examples as ``model`` reads them, int64 (vocab_size,).

    They are spread evenly over the dataset, as many as have ``tokens`` positions, padding included, or all.
    """
    windows = spread_windows(dataset, max(1, tokens // dataset.sequence_length))
    ids, count = tokens_that_count(model, windows)
    return np.bincount(ids[count], minlength=model.config.vocab_size)
