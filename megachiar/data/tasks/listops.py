"""Generate ListOps as the Long Range Arena defines it: nested lists of operators over digits, and their value.

``[MAX 4 [MIN 2 3 ] 1 [MED 1 5 8 9 2 ] ]`` has the value 5. Operators are MAX, MIN, MED (the median, rounded down) and
SM (the sum modulo 10). A node is an operator with probability 1/4 and else a digit, and always a digit at the largest
depth. An operator has 2 to ``max_args`` arguments. Operators, closing brackets and digits are tokens. Expressions of
more than ``min_length`` and fewer than ``max_length`` tokens are kept. (https://arxiv.org/abs/2011.04006, section 2.2.1
and its generator.)

Candidate k of a part is a function of seed, part and k. So the test set of a seed is the same whatever the sizes of the
other parts, and a smaller part is the beginning of a larger one. No expression occurs twice, in one part or in two.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megachiar.data.tasks.task_corpus import Example
from megachiar.errors import UserError

OPERATORS = ("MIN", "MAX", "MED", "SM")
OPERATOR_SHARE = 0.25
CLOSING = "]"
DRAWS_IN_VAIN = 200_000  # in a row, after which no expression is looked for any more
DEEPEST = 100


class _TooLong(Exception):
    """An expression has too many tokens, so that the rest of it need not be drawn."""


@dataclass(frozen=True, kw_only=True)
class ListOpsSettings:
    """Say which expressions are generated; the defaults are those of the Long Range Arena.

    Attributes:
        seed: of the expressions.
        train, valid, test: how many expressions each part has.
        min_length, max_length: an expression has more tokens than the first and fewer than the second.
        max_args: the most arguments of an operator.
        max_depth: the largest depth of a node; the outermost one has depth 1.
    """

    seed: int
    train: int = 96_000
    valid: int = 2_000
    test: int = 2_000
    min_length: int = 500
    max_length: int = 2_000
    max_args: int = 10
    max_depth: int = 10

    @property
    def counts(self) -> dict[str, int]:
        """Return how many expressions each part has; the held-out ones are drawn first, and training avoids them."""
        return {"test": self.test, "valid": self.valid, "train": self.train}


def listops(settings: ListOpsSettings) -> Iterator[Example]:
    """Yield the examples of all parts, each with ``text`` and ``label``, a digit.

    Raises:
        UserError: the settings leave no expression, or fewer different ones than are asked for.
    """
    check_settings(settings)
    seen: set[bytes] = set()
    for part, count in settings.counts.items():
        candidate = in_vain = found = 0
        while found < count:
            drawn = draw(random.Random(f"listops {settings.seed} {part} {candidate}"), settings)
            candidate += 1
            digest = b"" if drawn is None else hashlib.blake2b(drawn[0].encode(), digest_size=16).digest()
            if drawn is None or digest in seen:
                in_vain += 1
                if in_vain == DRAWS_IN_VAIN:
                    raise _no_expression(settings, part, found)
                continue
            seen.add(digest)
            found, in_vain = found + 1, 0
            text, value = drawn
            yield part, {"text": text, "label": value}


def draw(rng: random.Random, settings: ListOpsSettings) -> tuple[str, int] | None:
    """Return the next expression of ``rng`` and its value; None if its length is out of bounds."""
    tokens: list[str] = []
    try:
        value = _draw_node(rng, settings, 1, tokens)
    except _TooLong:
        return None
    return (" ".join(tokens), value) if len(tokens) > settings.min_length else None


def _draw_node(rng: random.Random, settings: ListOpsSettings, depth: int, tokens: list[str]) -> int:
    """Append the tokens of a node at ``depth`` to ``tokens``, and return its value."""
    if depth == settings.max_depth or rng.random() > OPERATOR_SHARE:
        value = _below(rng, 10)
        _append(tokens, str(value), settings)
        return value
    operator = OPERATORS[_below(rng, len(OPERATORS))]
    _append(tokens, f"[{operator}", settings)
    arguments = 2 + _below(rng, settings.max_args - 1)
    values = [_draw_node(rng, settings, depth + 1, tokens) for _ in range(arguments)]
    _append(tokens, CLOSING, settings)
    return value_of(operator, values)


def _append(tokens: list[str], token: str, settings: ListOpsSettings) -> None:
    tokens.append(token)
    if len(tokens) >= settings.max_length:
        raise _TooLong


def _below(rng: random.Random, limit: int) -> int:
    """Return a whole number from 0 to ``limit - 1``; of all methods only ``random`` is the same in every Python."""
    return int(rng.random() * limit)


def value_of(operator: str, values: Sequence[int]) -> int:
    """Return the value of an operator over digits, a digit."""
    if operator == "MED":
        middle = sorted(values)[(len(values) - 1) // 2 : len(values) // 2 + 1]
        return sum(middle) // len(middle)
    if operator == "SM":
        return sum(values) % 10
    return min(values) if operator == "MIN" else max(values)


def check_settings(settings: ListOpsSettings) -> None:
    """Refuse settings that no expression can meet.

    Raises:
        UserError: a number is out of range, or no expression is as long as is asked for.
    """
    limits: Mapping[str, tuple[int, float]] = {
        "train": (1, float("inf")),
        "valid": (1, float("inf")),
        "test": (1, float("inf")),
        "min_length": (0, float("inf")),
        "max_args": (2, float("inf")),
        "max_depth": (1, DEEPEST),
    }
    for name, (least, most) in limits.items():
        if not least <= (value := getattr(settings, name)) <= most:
            option = f"--{name.replace('_', '-')}"
            wanted = f"{least} or more" if most == float("inf") else f"{least} to {most}"
            raise UserError(option, f"{value} is not {wanted}", f"give {wanted}")
    if settings.max_length < settings.min_length + 2:
        problem = f"no expression has more than {settings.min_length} and fewer than {settings.max_length} tokens"
        raise UserError("--max-length", problem, f"give at least {settings.min_length + 2}")
    longest = 1
    for _ in range(settings.max_depth - 1):
        longest = 2 + settings.max_args * longest
    if longest <= settings.min_length:
        problem = (
            f"{settings.max_depth} with --max-args {settings.max_args} gives at most {longest} tokens, but "
            f"expressions have more than --min-length {settings.min_length}"
        )
        raise UserError("--max-depth", problem, "allow more depth or arguments, or shorter expressions")


def _no_expression(settings: ListOpsSettings, part: str, found: int) -> UserError:
    """Return the error for settings that leave too few different expressions."""
    problem = (
        f"{DRAWS_IN_VAIN:,} expressions were drawn in a row, and each has {settings.min_length} tokens or fewer, "
        f"{settings.max_length} or more, or was drawn before; {found:,} of {settings.counts[part]:,} were found"
    )
    return UserError(f"--{part}", problem, "ask for fewer, or allow other lengths, more depth or more arguments")
