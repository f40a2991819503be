"""How well a model predicts a text: token perplexity, word perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from megachiar.data.sampling.dataset import IGNORED_TARGET, ValidationSet

# Summed cross-entropy in nats and number of targets of (inputs, targets), both (n, T).
Score = Callable[[np.ndarray, np.ndarray], tuple[float, int]]


@dataclass(frozen=True)
class Evaluation:
    """Loss of a model on a validation set.

    Attributes:
        tokens: targets that were predicted.
        loss: mean cross-entropy a token, in nats.
        token_ppl: exp(loss).
        word_ppl: exp of the cross-entropy a whitespace-separated word; None where the words are not known.
        bits_per_byte: cross-entropy in bits per UTF-8 byte of the text; None where the bytes are not known.
        complete: whether the whole set was read. If not, words and bytes are taken in proportion to the tokens.
    """

    tokens: int
    loss: float
    token_ppl: float
    word_ppl: float | None
    bits_per_byte: float | None
    complete: bool

    def as_dict(self) -> dict[str, float | int | bool | None]:
        return asdict(self)


def evaluate(
    score: Score,
    dataset: ValidationSet,
    batch_size: int,
    *,
    windows: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    reduce_sum: Callable[[list[float]], list[float]] = lambda values: values,
) -> Evaluation:
    """Score the first ``windows`` windows of ``dataset`` (None: all), shared out over ``ranks``.

    Every rank calls ``score`` equally often (ZeRO 3 gathers parameters in step): one that has no window left scores
    padding. ``reduce_sum`` adds values up over the ranks.
    """
    total = min(windows or dataset.windows, dataset.windows)
    nats, targets = 0.0, 0
    for first in range(0, total, batch_size * ranks):
        begin = min(first + rank * batch_size, total)
        inputs, wanted = dataset.batch(begin, min(begin + batch_size, total))
        if len(inputs) == 0:
            inputs = np.zeros((1, dataset.sequence_length), np.int64)
            wanted = np.full_like(inputs, IGNORED_TARGET)
        batch_nats, batch_targets = score(inputs, wanted)
        nats, targets = nats + batch_nats, targets + batch_targets
    nats, count = reduce_sum([nats, float(targets)])
    return summarise(nats, round(count), dataset)


def summarise(nats: float, tokens: int, dataset: ValidationSet) -> Evaluation:
    """The measures of ``nats`` summed over ``tokens`` targets of ``dataset``."""
    share = tokens / dataset.targets
    loss = nats / tokens
    return Evaluation(
        tokens=tokens,
        loss=loss,
        token_ppl=_exp(loss),
        word_ppl=_exp(nats / (dataset.words * share)) if dataset.words else None,
        bits_per_byte=nats / math.log(2) / (dataset.text_bytes * share) if dataset.text_bytes else None,
        complete=tokens == dataset.targets,
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
