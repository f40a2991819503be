"""Measure how well a model classifies: loss, accuracy and macro-F1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megachiar.data.sampling.examples import ExampleSet
from megachiar.kernels.ignored_target import IGNORED_TARGET, PADDING

Classify = Callable[[np.ndarray, int, int], tuple[torch.Tensor, torch.Tensor]]
"""Takes samples, int64 (n, T + 1), the number of their task, and of the first sample in its set; returns the summed
cross-entropy in nats, () float64, and the confusion matrix (C, C) int64 by label and predicted class, on the model's
device."""


@dataclass(frozen=True)
class Classification:
    """How well a model classifies a labelled dataset.

    Attributes:
        examples: how many were classified.
        loss: mean cross-entropy in nats per example.
        accuracy: share of examples whose class was predicted.
        macro_f1: mean over classes of F1, the harmonic mean of precision and recall. Classes that neither occur nor are
            predicted do not count.
        complete: whether the whole set was read.
    """

    examples: int
    loss: float
    accuracy: float
    macro_f1: float
    complete: bool

    def as_dict(self) -> dict[str, float | int | bool | None]:
        """Return the fields by name, as metrics.jsonl and ``--json`` hold them."""
        return asdict(self)

    def describe(self) -> str:
        """Return the measures as the log shows them."""
        return f"loss {self.loss:.4f}  accuracy {self.accuracy:.2%}  macro-F1 {self.macro_f1:.4f}"


def evaluate_examples(
    classify: Classify,
    dataset: ExampleSet,
    batch_size: int,
    *,
    examples: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    reduce_sum: Callable[[list[float]], list[float]] = lambda values: values,
    before_batch: Callable[[int], None] = lambda example: None,
) -> Classification:
    """Classify a labelled dataset on several ranks, each of which calls this function.

    Arguments are those of ``evaluation.evaluate``; ``examples`` is how many all ranks together classify, from the first
    on. A rank that has none left classifies padding. The sums stay on the device, and are read once at the end.
    """
    total = min(examples or dataset.windows, dataset.windows)
    sums: torch.Tensor | float = 0.0
    for first in range(0, total, batch_size * ranks):
        before_batch(first)
        begin = min(first + rank * batch_size, total)
        samples = dataset.batch(begin, min(begin + batch_size, total))
        if len(samples) == 0:
            samples = np.full((1, dataset.sequence_length + 1), PADDING, np.int64)
            samples[:, -1] = IGNORED_TARGET
        batch_nats, batch_confusion = classify(samples, dataset.task, begin)
        sums = sums + torch.cat([batch_nats[None], batch_confusion.flatten().double()])
    assert isinstance(sums, torch.Tensor), "a dataset has an example"
    nats, *counts = reduce_sum(sums.tolist())
    classes = math.isqrt(len(counts))
    return summarise_confusion(nats, np.array(counts).reshape(classes, classes), complete=total == dataset.windows)


def summarise_confusion(nats: float, confusion: NDArray[np.float64], *, complete: bool) -> Classification:
    """Return the measures of a confusion matrix (C, C) by label and predicted class, and of its summed loss."""
    count = confusion.sum()
    right, of_label, of_prediction = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    seen = of_label + of_prediction > 0
    f1 = 2 * right[seen] / (of_label + of_prediction)[seen]
    return Classification(
        examples=round(float(count)),
        loss=nats / float(count),
        accuracy=float(right.sum() / count),
        macro_f1=float(f1.mean()) if seen.any() else math.nan,
        complete=complete,
    )
