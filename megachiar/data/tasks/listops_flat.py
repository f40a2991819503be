"""Generate the flat lists that CHIAR-Former's published code calls ListOps, number for number.

An example is one operator over 4 to 8 digits, as ready-made ids: 14 opens it, then 10 (maximum), 11 (minimum), 12
(mean, rounded down) or 13 (median, rounded down), the digits, and 15. 16 pads, where padding is asked for: the
published code pads each list to 256 ids and takes the mean of the hidden states over all, padding included.

Training and test examples are those of the published seeds 42 and 99. The published code has no validation set. Here
validation examples have a seed of their own, 7, so that no training example is lost. Lists are short: 9 % of the test
examples stand in the training set as they are, and 70 % with their digits in any order, which changes no label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megachiar.data.tasks.listops import value_of
from megachiar.data.tasks.task_corpus import Example
from megachiar.errors import UserError

OPENING, CLOSING, PADDING = 14, 15, 16
FIRST_OPERATOR = 10
OPERATORS = ("maximum", "minimum", "mean", "median")
VOCAB_SIZE = 17
SEEDS = {"train": 42, "valid": 7, "test": 99}
COUNTS = {"train": 96_000, "valid": 2_000, "test": 2_000}
FEWEST_DIGITS, MOST_DIGITS = 4, 8
LONGEST = MOST_DIGITS + 3


@dataclass(frozen=True, kw_only=True)
class FlatSettings:
    """Say how many lists are generated; the defaults are those of the published code.

    Attributes:
        train, valid, test: how many examples each part has; fewer are the first ones of its seed.
        pad_to: the length in ids that each list is padded to; None pads nothing.
    """

    train: int = COUNTS["train"]
    valid: int = COUNTS["valid"]
    test: int = COUNTS["test"]
    pad_to: int | None = None


def flat_listops(settings: FlatSettings) -> Iterator[Example]:
    """Yield the examples of all parts, each with ``tokens`` and ``label``, a digit.

    Raises:
        UserError: a part is to have no example, or padding would cut lists.
    """
    if settings.pad_to is not None and settings.pad_to < LONGEST:
        raise UserError("--pad-to", f"{settings.pad_to} would cut lists of {LONGEST} ids", f"give {LONGEST} or more")
    for part, seed in SEEDS.items():
        count = getattr(settings, part)
        if count < 1:
            raise UserError(f"--{part}", f"{count} examples", "give 1 or more")
        for tokens, label in lists(count, seed):
            padding = [PADDING] * ((settings.pad_to or 0) - len(tokens))
            yield part, {"tokens": tokens + padding, "label": label}


def lists(count: int, seed: int) -> Iterator[tuple[list[int], int]]:
    """Yield ids and label of the first ``count`` lists of a seed.

    The draws and their order are the published ones: the operator, the number of digits, then each digit.
    """
    rng = np.random.RandomState(seed)
    for _ in range(count):
        operator = int(rng.randint(0, len(OPERATORS)))
        size = int(rng.randint(FEWEST_DIGITS, MOST_DIGITS + 1))
        digits = [int(rng.randint(0, 10)) for _ in range(size)]
        yield [OPENING, FIRST_OPERATOR + operator, *digits, CLOSING], label_of(OPERATORS[operator], digits)


def label_of(operator: str, digits: Sequence[int]) -> int:
    """Return the label of a list, a digit."""
    if operator == "mean":
        return sum(digits) // len(digits)
    return value_of({"maximum": "MAX", "minimum": "MIN", "median": "MED"}[operator], digits)
