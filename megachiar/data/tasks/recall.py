"""Generate associative recall: pairs of a key and a value among fillers, and later each key again with its value.

    .3 k7 v2 .0 k1 v9 .5 k1 v9 .1 k7 v2

The second ``v9`` and the second ``v2`` are the answers. The distance goes from an answer back to the value that it
repeats: 3 tokens and 8 tokens. Keys of an example differ, so that each has one value. Distances are drawn so that each
octave is about as frequent. The task is the classical test of what a sequence model remembers (Arora et al., Zoology,
arXiv:2312.04927).
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
from megachiar.errors import UserError

PLACES = 8  # tokens of an example for each pair, of which pair and query fill 4
TRIES = 100  # to place a pair and its query, after which another example is drawn


@dataclass(frozen=True, kw_only=True)
class RecallSettings(LongRangeSettings):
    """Say which examples of associative recall are drawn.

    Attributes:
        pairs: of an example; each is asked for once.
        keys, values: how many different keys and values there are.
    """

    pairs: int = 8
    keys: int = 32
    values: int = 32


def recall(settings: RecallSettings) -> Iterator[Example]:
    """Yield the examples of all parts.

    Raises:
        UserError: a number is out of range, the pairs do not fit, or there are too few different examples.
    """
    symbols = MOST_SYMBOLS
    check_numbers(
        settings,
        [("keys", 1, symbols), ("values", 2, symbols), ("pairs", 1, settings.keys)],
    )
    if settings.length < PLACES * settings.pairs:
        problem = f"{settings.length} tokens: {settings.pairs} pairs and their queries fill more than half"
        raise UserError("--length", problem, f"give {PLACES * settings.pairs} or more, or fewer --pairs")
    return draw_examples("recall", settings, lambda rng: draw_recall(rng, settings))


def draw_recall(rng: random.Random, settings: RecallSettings) -> Drawn | None:
    """Return an example; None if its pairs found no place."""
    tokens = draw_fillers(rng, settings, settings.length)
    free = [True] * settings.length
    answers = []
    for key in some_of(rng, FIRST_KEY, settings.keys, settings.pairs):
        value = FIRST_VALUE + below(rng, settings.values)
        for _ in range(TRIES):
            distance = log_uniform(rng, 2, settings.length - 2)
            pair = below(rng, settings.length - 1 - distance)
            query = pair + distance
            cells = (pair, pair + 1, query, query + 1)
            if all(free[cell] for cell in cells):
                break
        else:
            return None
        for cell, token in zip(cells, (key, value, key, value), strict=True):
            tokens[cell], free[cell] = token, False
        answers.append(Answer(query + 1, distance))
    return Drawn(tokens, sorted(answers))
