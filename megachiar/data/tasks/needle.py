"""Generate needle retrieval: facts in filler text, and at the end a question after one of them.

    .4 = k3 v8 .7 .7 .2 = k5 v1 .0 .9 .3 ? k3 v8

The last token is the answer. The distance goes from it back to the value in the fact: 12 tokens here. Facts have
different keys. ``depth`` puts the fact at a given share of the text; without it each octave of distances is about as
frequent.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from megachiar.data.tasks.long_range import (
    ASK,
    EQUALS,
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

FACT, QUESTION = 3, 3  # tokens of a fact, and of the question with its answer
TRIES = 100  # to place a fact, after which another example is drawn


@dataclass(frozen=True, kw_only=True)
class NeedleSettings(LongRangeSettings):
    """Say which examples of needle retrieval are drawn.

    Attributes:
        facts: of an example; one of them is asked for.
        keys, values: how many different keys and values there are.
        depth: where the fact that is asked for stands: 0 at the beginning of the text, 1 right before the question;
            None draws its distance.
    """

    facts: int = 4
    keys: int = 32
    values: int = 32
    depth: float | None = None


def needle(settings: NeedleSettings) -> Iterator[Example]:
    """Yield the examples of all parts.

    Raises:
        UserError: a number is out of range, the facts do not fit, or there are too few different examples.
    """
    symbols = MOST_SYMBOLS
    check_numbers(
        settings,
        [("facts", 1, settings.keys), ("keys", 1, symbols), ("values", 2, symbols)],
    )
    least = 2 * FACT * settings.facts + QUESTION
    if settings.length < least:
        problem = f"{settings.length} tokens: {settings.facts} facts would fill more than half of the text"
        raise UserError("--length", problem, f"give {least} or more, or fewer --facts")
    return draw_examples("needle", settings, lambda rng: draw_needle(rng, settings))


def draw_needle(rng: random.Random, settings: NeedleSettings) -> Drawn | None:
    """Return an example; None if its facts found no place."""
    text = settings.length - QUESTION  # the question begins here
    tokens = draw_fillers(rng, settings, text)
    free = [True] * text
    keys = some_of(rng, FIRST_KEY, settings.keys, settings.facts)
    values = [FIRST_VALUE + below(rng, settings.values) for _ in keys]
    asked = text - log_uniform(rng, FACT, text) if settings.depth is None else round(settings.depth * (text - FACT))
    for number, (key, value) in enumerate(zip(keys, values, strict=True)):
        places = (asked,) if number == 0 else (below(rng, text - FACT + 1) for _ in range(TRIES))
        place = next((place for place in places if all(free[place : place + FACT])), None)
        if place is None:
            return None
        tokens[place : place + FACT] = [EQUALS, key, value]
        free[place : place + FACT] = [False] * FACT
    distance = settings.length - 1 - (asked + FACT - 1)
    return Drawn([*tokens, ASK, keys[0], values[0]], [Answer(settings.length - 1, distance)])
