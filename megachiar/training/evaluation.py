"""Measure how well a model predicts a text: token perplexity, word perplexity and bits per byte.

Shapes: n windows, T = sequence length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from megachiar.data.sampling.dataset import ValidationSet
from megachiar.kernels.ignored_target import IGNORED_TARGET

Score = Callable[[np.ndarray, np.ndarray, int], tuple[torch.Tensor, int]]
"""Takes inputs and targets, int64 (n, T), of consecutive windows, and the number of the first one in its set; returns
the summed cross-entropy in nats, () float64 on the model's device, and the number of targets. The numbers key random
routes: a window takes the same ones in every layout and batch size."""


@dataclass(frozen=True)
class Evaluation:
    """Loss of a model on a validation set.

    Attributes:
        tokens: number of targets that were predicted.
        loss: mean cross-entropy in nats per token.
        token_ppl: perplexity per token, exp(loss).
        word_ppl: exp of the mean cross-entropy in nats per whitespace-separated word; None without a word count.
        bits_per_byte: cross-entropy in bits per UTF-8 byte of the text; None without a byte count.
        complete: whether the whole set was read. If not, words and bytes are counted in proportion to the tokens.
    """

    tokens: int
    loss: float
    token_ppl: float
    word_ppl: float | None
    bits_per_byte: float | None
    complete: bool

    def as_dict(self) -> dict[str, float | int | bool | None]:
        """Return the fields by name, as metrics.jsonl and ``--json`` hold them."""
        return asdict(self)

    def describe(self) -> str:
        """Return the measures as the log shows them."""
        word = f"  word PPL {self.word_ppl:.2f}" if self.word_ppl else ""
        bits = f"  {self.bits_per_byte:.4f} bits/byte" if self.bits_per_byte else ""
        return f"loss {self.loss:.4f}  token PPL {self.token_ppl:.2f}{word}{bits}"


def evaluate(
    score: Score,
    dataset: ValidationSet,
    batch_size: int,
    *,
    windows: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    reduce_sum: Callable[[list[float]], list[float]] = lambda values: values,
    before_batch: Callable[[int], None] = lambda window: None,
) -> Evaluation:
    """Score a validation set on several ranks, each of which calls this function.

    Every rank calls ``score`` equally often, since ZeRO 3 gathers parameters on all ranks at once. A rank that has no
    window left scores padding. The sum stays on the device, and is read once at the end.

    Args:
        score: of the model.
        dataset: the validation set.
        batch_size: windows that one call of ``score`` gets, per rank.
        windows: number of windows that all ranks together score, from the first on; None scores all.
        rank: number of this rank among ``ranks``.
        ranks: number of ranks that share the windows.
        reduce_sum: returns the sum of each value over all ranks.
        before_batch: is called on every rank before each batch, with the number of its first window on rank 0. What it
            raises breaks the evaluation off.
    """
    total = min(windows or dataset.windows, dataset.windows)
    nats: torch.Tensor | float = 0.0
    targets = 0
    for first in range(0, total, batch_size * ranks):
        before_batch(first)
        begin = min(first + rank * batch_size, total)
        inputs, wanted = dataset.batch(begin, min(begin + batch_size, total))
        if len(inputs) == 0:
            inputs = np.zeros((1, dataset.sequence_length), np.int64)
            wanted = np.full_like(inputs, IGNORED_TARGET)
        batch_nats, batch_targets = score(inputs, wanted, begin)
        nats, targets = nats + batch_nats, targets + batch_targets
    all_nats, count = reduce_sum([float(nats), float(targets)])
    return summarise(all_nats, round(count), dataset)


def summarise(nats: float, tokens: int, dataset: ValidationSet) -> Evaluation:
    """Return the measures of a cross-entropy of ``nats``, summed over ``tokens`` targets of ``dataset``."""
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
