"""Generate nested ListOps in which one argument decides, at a given distance from its operator.

    .2 .5 [MAX 4 [MIN 9 3 ] 1 7 [SM 6 7 ] 2 ] = 7

The outermost operator is MAX or MIN, and the argument that decides is a digit: no other argument, each a digit or a
list, comes up to its value. The last token is the answer. The distance goes from the operator to that digit: 7 tokens
here. Longer distances have more lists between them, and deeper ones. What an example lacks in length is fillers before
the expression. Operators are those of ``listops``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megachiar.data.tasks.listops import OPERATORS, value_of
from megachiar.data.tasks.long_range import (
    EQUALS,
    FIRST_DIGIT,
    FIRST_OPERATOR,
    LIST_END,
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

SMALLEST_LIST = 4  # tokens: operator, two arguments, end
LONGEST_LIST = 24  # tokens of an argument
LIST_SHARE = 0.5  # of the arguments that have room for a list
AROUND = 5  # tokens of an example beside the other arguments: operator, digit, end, mark, answer
TRIES = 50  # to draw a list with a value that decides nothing, after which it is a digit


@dataclass(frozen=True, kw_only=True)
class ListOpsDistanceSettings(LongRangeSettings):
    """Say which expressions are drawn.

    Attributes:
        max_depth: the deepest level of a list, that of the outermost operator being 1.
    """

    max_depth: int = 4


def listops_distance(settings: ListOpsDistanceSettings) -> Iterator[Example]:
    """Yield the examples of all parts.

    Raises:
        UserError: a number is out of range, or there are too few different examples.
    """
    check_numbers(settings, [("length", AROUND + 1, None), ("max_depth", 1, 100)])
    return draw_examples("listops-distance", settings, lambda rng: draw_expression(rng, settings))


def draw_expression(rng: random.Random, settings: ListOpsDistanceSettings) -> Drawn:
    """Return an example."""
    operator = OPERATORS[below(rng, 2)]  # MIN or MAX
    decisive = 3 + below(rng, 7) if operator == "MAX" else below(rng, 7)

    def loses(value: int) -> bool:
        return value < decisive if operator == "MAX" else value > decisive

    room = settings.length - AROUND
    distance = log_uniform(rng, 1, room + 1)
    after = below(rng, room - (distance - 1) + 1)
    expression = [
        FIRST_OPERATOR + OPERATORS.index(operator),
        *_arguments(rng, distance - 1, settings.max_depth, loses),
        FIRST_DIGIT + decisive,
        *_arguments(rng, after, settings.max_depth, loses),
        LIST_END,
    ]
    before = draw_fillers(rng, settings, settings.length - len(expression) - 2)
    tokens = [*before, *expression, EQUALS, FIRST_DIGIT + decisive]
    return Drawn(tokens, [Answer(settings.length - 1, distance)])


def _arguments(rng: random.Random, size: int, depth: int, loses: Callable[[int], bool]) -> list[int]:
    """Return arguments of ``size`` tokens together, all with values that lose; ``depth`` levels may be used."""
    tokens: list[int] = []
    while (left := size - len(tokens)) > 0:
        tokens += _argument(rng, min(left, LONGEST_LIST), depth, loses)
    return tokens


def _argument(rng: random.Random, room: int, depth: int, loses: Callable[[int], bool]) -> list[int]:
    """Return an argument of at most ``room`` tokens that loses."""
    if depth > 1 and room >= SMALLEST_LIST and rng.random() < LIST_SHARE:
        size = SMALLEST_LIST + below(rng, room - SMALLEST_LIST + 1)
        for _ in range(TRIES):
            tokens, value = _list(rng, size, depth - 1)
            if loses(value):
                return tokens
    return [FIRST_DIGIT + _draw_until(rng, loses)]


def _draw_until(rng: random.Random, loses: Callable[[int], bool]) -> int:
    """Return a random digit that loses, of which there are at least three."""
    while not loses(digit := below(rng, 10)):
        pass
    return digit


def _list(rng: random.Random, size: int, depth: int) -> tuple[list[int], int]:
    """Return a list of ``size`` tokens, ``depth`` levels deep at most, and its value."""
    number = below(rng, len(OPERATORS))
    tokens = [FIRST_OPERATOR + number]
    values: list[int] = []
    while (left := size - 1 - len(tokens)) > 0:
        # A list that fills its whole parent would be its only argument.
        room = left if values else left - 1
        if depth > 1 and room >= SMALLEST_LIST and rng.random() < LIST_SHARE:
            inner, value = _list(rng, SMALLEST_LIST + below(rng, room - SMALLEST_LIST + 1), depth - 1)
        else:
            value = below(rng, 10)
            inner = [FIRST_DIGIT + value]
        tokens += inner
        values.append(value)
    return [*tokens, LIST_END], value_of(OPERATORS[number], values)
