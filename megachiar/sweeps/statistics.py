"""Mean, spread and paired differences of a few numbers, one for each seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Some numbers in short.

    Attributes:
        n: how many there are.
        mean: of them.
        deviation: standard deviation of a sample (divided by n - 1); None of one number.
        least, most: the smallest and the largest.
    """

    n: int
    mean: float
    deviation: float | None
    least: float
    most: float


class Difference(NamedTuple):
    """How much larger the numbers of a variant are than those of the reference with the same seeds.

    Attributes:
        n: seeds that both have.
        mean: of the differences.
        deviation: standard deviation of the differences; None of one.
        low, high: bounds of the mean with a confidence of 95 %, by Student's t; None of one difference.
    """

    n: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None


def spread(values: Sequence[float]) -> Spread:
    """Return mean and spread of at least one number."""
    n, mean = len(values), math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    return Spread(n, mean, deviation, min(values), max(values))


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Return how ``values`` differ from ``reference``, both by seed; None if they have no seed in common.

    What the seeds have in common, such as the order of samples, cancels in the differences. The interval supposes that
    differences are distributed normally, and says nothing of several comparisons at once.
    """
    differences = [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
    if not differences:
        return None
    n, mean, deviation, _, _ = spread(differences)
    if deviation is None:
        return Difference(n, mean, None, None, None)
    reach = t_quantile((1 + CONFIDENCE) / 2, n - 1) * deviation / math.sqrt(n)
    return Difference(n, mean, deviation, mean - reach, mean + reach)


def t_quantile(probability: float, freedom: int) -> float:
    """Return the number that Student's t stays below with ``probability``, from one half up, by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_probability(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_probability(t: float, freedom: int) -> float:
    """Return the probability that Student's t of a whole number of degrees of freedom stays below ``t``, at least 0.

    The finite sums of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    is_odd = freedom % 2 == 1
    term = cosine if is_odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if is_odd else 2, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    within = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return (1 + within) / 2
