"""Hold what the long-range tasks share: one vocabulary, examples whose answers have a distance, and their drawing.

The tasks are texts for a language model. A classification would pool the hidden states of all tokens, and so carry a
far token to the answer without attention. An example is a list of ids and its *answers*: the positions of the tokens
that can be known from what is before them, each with its distance in tokens. All other tokens are drawn at random.

    ids 0 .. 15      fillers .0 to .15       id 24           the end ] of a list
    ids 16 .. 18     marks # ? =             ids 25 .. 34    digits
    ids 20 .. 23     operators of lists      ids 48 .. 111   keys k0 to k63
                                             ids 112 .. 175  values v0 to v63

Example k of a part is a function of task, settings, seed, part and k. So the test set of a seed is the same whatever
the sizes of the other parts, and a smaller part is the beginning of a larger one. No example occurs twice, in one part
or in two.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megachiar.data.tasks.listops import CLOSING, OPERATORS
from megachiar.data.tasks.task_corpus import Example
from megachiar.errors import UserError

VOCAB_SIZE = 176
FILLERS = tuple(range(16))
BEGIN, ASK, EQUALS = 16, 17, 18
FIRST_OPERATOR, LIST_END, FIRST_DIGIT = 20, 24, 25
FIRST_KEY, FIRST_VALUE, MOST_SYMBOLS = 48, 112, 64
DRAWS_IN_VAIN = 10_000  # in a row, after which no example is looked for any more
NAMES = {
    **{token: f".{token}" for token in FILLERS},
    **dict(zip((BEGIN, ASK, EQUALS), "#?=", strict=True)),
    **{FIRST_OPERATOR + number: f"[{operator}" for number, operator in enumerate(OPERATORS)},
    LIST_END: CLOSING,
    **{FIRST_DIGIT + digit: str(digit) for digit in range(10)},
    **{FIRST_KEY + number: f"k{number}" for number in range(MOST_SYMBOLS)},
    **{FIRST_VALUE + number: f"v{number}" for number in range(MOST_SYMBOLS)},
}
"""The word of each id in the ``text`` of an example; ids that are missing here never occur."""


class Answer(NamedTuple):
    """Say where an answer is, and how far from it is what decides it.

    Attributes:
        position: of the token in its example, from 0.
        distance: in tokens; each task says from where to where.
    """

    position: int
    distance: int


class Drawn(NamedTuple):
    """Hold an example: its ids, and its answers by rising position."""

    tokens: list[int]
    answers: list[Answer]


@dataclass(frozen=True, kw_only=True)
class LongRangeSettings:
    """Say which examples are drawn; each task adds its own settings.

    Attributes:
        seed: of the examples.
        train, valid, test: how many examples each part has.
        length: the tokens of an example.
        fillers: how many different fillers there are.
    """

    seed: int
    train: int = 40_000
    valid: int = 500
    test: int = 2_000
    length: int = 128
    fillers: int = 16

    @property
    def counts(self) -> dict[str, int]:
        """Return how many examples each part has; the held-out ones are drawn first, and training avoids them."""
        return {"test": self.test, "valid": self.valid, "train": self.train}


def draw_examples(
    task: str, settings: LongRangeSettings, draw: Callable[[random.Random], Drawn | None]
) -> Iterator[Example]:
    """Yield the examples of all parts, each with ``tokens``, ``text`` and ``answers`` [[position, distance], ...].

    Args:
        task: its name, a key of all draws.
        settings: of the task.
        draw: returns an example, or None where a draw led to none.

    Raises:
        UserError: there are fewer different examples than are asked for.
    """
    seen: set[bytes] = set()
    for part, count in settings.counts.items():
        candidate = in_vain = found = 0
        while found < count:
            drawn = draw(random.Random(f"{task} {settings.seed} {part} {candidate}"))
            candidate += 1
            digest = b"" if drawn is None else hashlib.blake2b(bytes(drawn.tokens), digest_size=16).digest()
            if drawn is None or digest in seen:
                in_vain += 1
                if in_vain == DRAWS_IN_VAIN:
                    raise _no_example(part, found, count)
                continue
            seen.add(digest)
            found, in_vain = found + 1, 0
            text = " ".join(NAMES[token] for token in drawn.tokens)
            yield part, {"tokens": drawn.tokens, "text": text, "answers": [list(answer) for answer in drawn.answers]}


def below(rng: random.Random, limit: int) -> int:
    """Return a whole number from 0 to ``limit - 1``; of all methods only ``random`` is the same in every Python."""
    return int(rng.random() * limit)


def log_uniform(rng: random.Random, least: int, most: int) -> int:
    """Return a whole number from ``least``, at least 1, to ``most``, so that each octave is about as likely."""
    return min(most, int(least * ((most + 1) / least) ** rng.random()))


def draw_fillers(rng: random.Random, settings: LongRangeSettings, count: int) -> list[int]:
    """Return ``count`` random fillers."""
    return [FILLERS[below(rng, settings.fillers)] for _ in range(count)]


def some_of(rng: random.Random, first: int, symbols: int, count: int) -> list[int]:
    """Return ``count`` different ids of the ``symbols`` ids from ``first`` on, in random order."""
    left = list(range(first, first + symbols))
    return [left.pop(below(rng, len(left))) for _ in range(count)]


def check_numbers(settings: LongRangeSettings, limits: Sequence[tuple[str, int, int | None]]) -> None:
    """Check the numbers of all tasks, and those of ``limits``: name, least and largest value, None for no limit.

    Raises:
        UserError: a number is out of range.
    """
    counts = [(name, 1, None) for name in ("train", "valid", "test")]
    for name, least, most in (*counts, ("fillers", 1, len(FILLERS)), *limits):
        value = getattr(settings, name)
        if value < least or (most is not None and value > most):
            wanted = f"{least} or more" if most is None else f"{least} to {most}"
            raise UserError(f"--{name.replace('_', '-')}", f"{value} is not {wanted}", f"give {wanted}")


def _no_example(part: str, found: int, count: int) -> UserError:
    """Return the error for settings that leave too few different examples."""
    problem = f"{DRAWS_IN_VAIN:,} draws in a row gave no new example; {found:,} of {count:,} were found"
    return UserError(f"--{part}", problem, "ask for fewer, or for longer examples")
