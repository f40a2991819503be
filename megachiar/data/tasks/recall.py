"""Generate associative recall: keys among fillers, each followed by its value, and again whenever it comes back.

    .3 k7 v2 k1 v9 .5 k1 v9 .1 k7 v2

The second ``v9`` and the second ``v2`` are the answers: their keys stood before them with these values. The distance
goes from an answer back to the last value of its key: 3 tokens and 8 tokens. A key keeps its value in an example.

How many keys an example has is drawn so that each octave is about as frequent, and each pair is one of them at random.
So some examples repeat one pair over and over, from which a model learns to copy, and others ask for what is far back.
The task is the classical test of what a sequence model remembers (Arora et al., Zoology, arXiv:2312.04927).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from megachiar.data.tasks.long_range import (
    FIRST_KEY,
    FIRST_VALUE,
    MOST_SYMBOLS,
    Answer,
    Drawn,
    LongRangeSettings,
    below,
    check_numbers,
    draw_examples,
    draw_fillers,
    log_uniform,
    some_of,
)
from megachiar.data.tasks.task_corpus import Example

FILLER_SHARE = 0.25
"""Probability that a filler comes next, and no pair."""


@dataclass(frozen=True, kw_only=True)
class RecallSettings(LongRangeSettings):
    """Say which examples of associative recall are drawn.

    Attributes:
        pairs: the most different keys of an example.
        keys, values: how many different keys and values there are in all examples.
    """

    pairs: int = 16
    keys: int = 32
    values: int = 32


def recall(settings: RecallSettings) -> Iterator[Example]:
    """Yield the examples of all parts.

    Raises:
        UserError: a number is out of range, or there are too few different examples.
    """
    symbols = [("keys", 1, MOST_SYMBOLS), ("values", 2, MOST_SYMBOLS), ("pairs", 1, settings.keys)]
    check_numbers(settings, [("length", 8, None), *symbols])
    return draw_examples("recall", settings, lambda rng: draw_recall(rng, settings))


def draw_recall(rng: random.Random, settings: RecallSettings) -> Drawn | None:
    """Return an example; None if no key comes back."""
    keys = some_of(rng, FIRST_KEY, settings.keys, log_uniform(rng, 1, settings.pairs))
    values = [FIRST_VALUE + below(rng, settings.values) for _ in keys]
    tokens: list[int] = []
    answers = []
    last: dict[int, int] = {}  # key -> where its value stood
    while len(tokens) < settings.length:
        if len(tokens) == settings.length - 1 or rng.random() < FILLER_SHARE:
            tokens += draw_fillers(rng, settings, 1)
            continue
        number = below(rng, len(keys))
        tokens += [keys[number], values[number]]
        position = len(tokens) - 1
        if number in last:
            answers.append(Answer(position, position - last[number]))
        last[number] = position
    return Drawn(tokens, answers) if answers else None
