"""Measure what a model keeps over a distance: answers by their distance, and the loss of any text by position.

Distances and positions come in octaves: 1, 2 to 3, 4 to 7, and so on.

Answers of one document are no independent observations: a string is copied whole or not at all. So an interval counts
documents where it must. The number of answers is divided by the *design effect*, the variance of the accuracy over
documents relative to that over independent answers, before Wilson's formula takes it. (Kish, Survey Sampling, 1965.)

Shapes: n sequences, T tokens of a sequence, A answers, K octaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megachiar.analysis.resampling import QUANTILE
from megachiar.data.sampling.dataset import ValidationSet
from megachiar.data.tasks.answered import AnsweredSet
from megachiar.kernels.ignored_target import IGNORED_TARGET

Predict = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Takes inputs and targets, int64 (n, T), and the numbers of the sequences in their set (n,), which key random routes.
Returns the cross-entropy in nats, float64 (n, T), 0 where there is no target, and whether the likeliest token is the
target, bool (n, T)."""
TokenLosses = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Takes what ``Predict`` takes, and returns the cross-entropy alone."""


@dataclass(frozen=True)
class Octave:
    """Name numbers from ``least``, a power of 2, to one below the next power."""

    least: int

    @property
    def most(self) -> int:
        """Return the largest number."""
        return 2 * self.least - 1

    def __str__(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least}-{self.most}"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Hold how a model gave answers, each array (A,).

    Attributes:
        document: the number of the answer's document.
        distance: in tokens.
        right: whether the likeliest token was the answer.
        nats: its cross-entropy.
    """

    document: np.ndarray
    distance: np.ndarray
    right: np.ndarray
    nats: np.ndarray

    def select(self, chosen: np.ndarray) -> Answers:
        """Return the answers for which ``chosen`` (A,) holds."""
        return Answers(
            document=self.document[chosen],
            distance=self.distance[chosen],
            right=self.right[chosen],
            nats=self.nats[chosen],
        )


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Say how well a model gave some answers.

    Attributes:
        least, most: their distances in tokens.
        answers, documents: how many there are, and in how many documents.
        right: how many were the likeliest token.
        accuracy: the share of them.
        low, high: its interval of 95 % after Wilson, see the top of this file.
        loss: mean cross-entropy of the answers in nats.
        loss_error: standard error of it, over documents; None of one document.
    """

    least: int
    most: int
    answers: int
    documents: int
    right: int
    accuracy: float
    low: float
    high: float
    loss: float
    loss_error: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """Say how well a model predicts the tokens at some positions of a window.

    Attributes:
        least, most: the positions, which are the numbers of tokens that a prediction sees.
        tokens: how many were predicted.
        loss: mean cross-entropy in nats.
        loss_error: standard error of it, over windows; None of one window.
    """

    least: int
    most: int
    tokens: int
    loss: float
    loss_error: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


class Measured(NamedTuple):
    """What was measured of a run on a dataset.

    Attributes:
        checkpoint, step: of the run.
        data: the dataset.
        total: accuracy of all answers, or by position the loss of all tokens.
        parts: by octave.
    """

    checkpoint: Path
    step: int
    data: Path
    total: Accuracy | float
    parts: Sequence[Accuracy] | Sequence[PositionLoss]

    def as_dict(self) -> dict[str, Any]:
        """Return the values as ``--json`` prints them."""
        whole = {"loss": self.total} if isinstance(self.total, float) else self.total.as_dict()
        by = "positions" if isinstance(self.total, float) else "distances"
        head = {"checkpoint": str(self.checkpoint), "step": self.step, "data": str(self.data)}
        return {**head, **whole, by: [part.as_dict() for part in self.parts]}


def measure_answers(
    predict: Predict, dataset: AnsweredSet, batch_size: int, advance: Callable[[int], None] = lambda count: None
) -> Answers:
    """Ask a model for every answer of a dataset, each document by itself, with all that is before the answer.

    Args:
        predict: of the model.
        dataset: with the answers.
        batch_size: documents that one call of ``predict`` gets at most; all of them have the same length, so that
            nothing is padded.
        advance: is told of documents that were read.
    """
    found: list[tuple[int, int, bool, float]] = []
    lengths = {number: len(dataset.tokens(number)) for number in range(dataset.documents)}
    for _, group in groupby(sorted(lengths, key=lambda number: (lengths[number], number)), lengths.__getitem__):
        numbers = list(group)
        for first in range(0, len(numbers), batch_size):
            batch = numbers[first : first + batch_size]
            tokens = np.stack([dataset.tokens(number) for number in batch])
            targets = np.full_like(tokens[:, 1:], IGNORED_TARGET)
            for row, number in enumerate(batch):
                places = [answer.position - 1 for answer in dataset.answers[number]]
                targets[row, places] = tokens[row, 1:][places]
            nats, right = predict(tokens[:, :-1], targets, np.array(batch))
            for row, number in enumerate(batch):
                for answer in dataset.answers[number]:
                    place = (row, answer.position - 1)
                    found.append((number, answer.distance, bool(right[place]), float(nats[place])))
            advance(len(batch))
    found.sort(key=lambda answer: answer[0])
    document, distance, is_right, losses = map(np.array, zip(*found, strict=True))
    return Answers(document=document, distance=distance, right=is_right, nats=losses)


def accuracy_by_distance(answers: Answers) -> list[Accuracy]:
    """Return the accuracy at each octave of distances that occurs."""
    octaves = _octaves(answers.distance)
    return [accuracy_of(answers.select(octaves == k), Octave(1 << k)) for k in np.unique(octaves).tolist()]


def accuracy_of(answers: Answers, octave: Octave | None = None) -> Accuracy:
    """Return the accuracy of at least one answer; without an octave the distances are those that occur."""
    _, cluster = np.unique(answers.document, return_inverse=True)
    given = np.bincount(cluster)
    right = np.bincount(cluster, answers.right)
    nats = np.bincount(cluster, answers.nats)
    low, high = wilson(int(right.sum()), len(answers.right), design_effect(right, given))
    return Accuracy(
        least=octave.least if octave else int(answers.distance.min()),
        most=octave.most if octave else int(answers.distance.max()),
        answers=len(answers.right),
        documents=len(given),
        right=int(right.sum()),
        accuracy=float(right.sum() / given.sum()),
        low=low,
        high=high,
        loss=float(nats.sum() / given.sum()),
        loss_error=ratio_error(nats, given),
    )


def design_effect(right: np.ndarray, given: np.ndarray) -> float:
    """Return how many answers tell as much as one that is independent of all others, at least 1.

    Args:
        right: right answers of each document (n,).
        given: answers of each document (n,), at least 1.

    Where all answers are right, or none, their variance tells nothing, and documents are counted.
    """
    answers, share = given.sum(), right.sum() / given.sum()
    error = ratio_error(right, given)
    if share in (0, 1) or error is None:
        return float(answers / len(given))
    if given.max() == 1:
        return 1.0
    return max(1.0, float(error**2 / (share * (1 - share) / answers)))


def wilson(right: int, answers: int, effect: float = 1.0) -> tuple[float, float]:
    """Return the interval of 95 % of a share, after Wilson (1927), for ``answers / effect`` independent answers."""
    n, share, z = answers / effect, right / answers, QUANTILE
    middle = share + z * z / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    whole = 1 + z * z / n
    return max(0.0, (middle - reach) / whole), min(1.0, (middle + reach) / whole)


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Return the standard error of ``sums.sum() / counts.sum()`` over clusters (n,), to first order; None of one."""
    if len(sums) < 2:
        return None
    residuals = sums - sums.sum() / counts.sum() * counts
    return float(np.sqrt(len(sums) / (len(sums) - 1) * np.square(residuals).sum()) / counts.sum())


def loss_by_position(
    losses: TokenLosses, dataset: ValidationSet, batch_size: int, advance: Callable[[int], None] = lambda count: None
) -> list[PositionLoss]:
    """Return the loss at each octave of positions in the windows of a text, those that ``megachiar evaluate`` reads.

    Args:
        losses: of the model.
        dataset: the text.
        batch_size: windows that one call of ``losses`` gets at most.
        advance: is told of windows that were read.
    """
    octaves = _octaves(np.arange(1, dataset.sequence_length + 1))
    sums, counts = (np.zeros((dataset.windows, octaves[-1] + 1)) for _ in range(2))
    for first in range(0, dataset.windows, batch_size):
        numbers = np.arange(first, min(first + batch_size, dataset.windows))
        inputs, targets = dataset.batch(first, first + len(numbers))
        nats, is_target = losses(inputs, targets, numbers), targets != IGNORED_TARGET
        for k in range(octaves[-1] + 1):
            sums[numbers, k] = nats[:, octaves == k].sum(1)
            counts[numbers, k] = is_target[:, octaves == k].sum(1)
        advance(len(numbers))
    found = []
    for k in range(octaves[-1] + 1):
        counted = counts[:, k] > 0
        nats, tokens = sums[counted, k], counts[counted, k]
        if counted.any():
            found.append(
                PositionLoss(
                    least=1 << k,
                    most=min(Octave(1 << k).most, dataset.sequence_length),
                    tokens=int(tokens.sum()),
                    loss=float(nats.sum() / tokens.sum()),
                    loss_error=ratio_error(nats, tokens),
                )
            )
    return found


def mean_loss(buckets: Sequence[PositionLoss]) -> float:
    """Return the loss of all positions together, that of ``megachiar evaluate``."""
    return math.fsum(b.loss * b.tokens for b in buckets) / sum(b.tokens for b in buckets)


def _octaves(numbers: np.ndarray) -> np.ndarray:
    """Return the octave of each number, at least 1: 0 for 1, 1 for 2 and 3, 2 for 4 to 7."""
    return np.array([int(number).bit_length() - 1 for number in numbers])
