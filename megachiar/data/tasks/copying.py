"""Generate copying: a random string, fillers, and the string again.

    .4 .1 # v3 v8 v3 v5 .2 .9 # v3 v8 v3 v5

All tokens of the second string are answers. Their distance, from a token back to the one that it repeats, is the same
for all of an example: 7 tokens here. What an example lacks in length is fillers before the first mark.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from megachiar.data.tasks.long_range import (
    BEGIN,
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
)
from megachiar.data.tasks.task_corpus import Example
from megachiar.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CopySettings(LongRangeSettings):
    """Say which examples of copying are drawn.

    Attributes:
        string: the tokens of the string.
        values: how many different tokens a string is made of.
    """

    string: int = 8
    values: int = 32


def copying(settings: CopySettings) -> Iterator[Example]:
    """Yield the examples of all parts.

    Raises:
        UserError: a number is out of range, the strings do not fit, or there are too few different examples.
    """
    limits = [("string", 1, None), ("values", 2, MOST_SYMBOLS)]
    check_numbers(settings, limits)
    least = 2 * settings.string + 2
    if settings.length < least:
        problem = f"{settings.length} tokens have no room for two strings of {settings.string} and their marks"
        raise UserError("--length", problem, f"give {least} or more, or a shorter --string")
    return draw_examples("copy", settings, lambda rng: draw_copy(rng, settings))


def draw_copy(rng: random.Random, settings: CopySettings) -> Drawn:
    """Return an example."""
    size = settings.string
    distance = log_uniform(rng, size + 1, settings.length - size - 1)
    string = [FIRST_VALUE + below(rng, settings.values) for _ in range(size)]
    before = draw_fillers(rng, settings, settings.length - distance - size - 1)
    between = draw_fillers(rng, settings, distance - size - 1)
    tokens = [*before, BEGIN, *string, *between, BEGIN, *string]
    return Drawn(tokens, [Answer(position, distance) for position in range(settings.length - size, settings.length)])
