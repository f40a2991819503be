"""Measure how much a feature of tokens says about their routes, beside what chance alone would show.

Mutual information of a finite sample is never 0: a table with many cells seems to explain something by chance. What
chance shows depends on how alike the routes of one token id are. A router that hashes the id gives every "the" one
route, so that a class of frequent words takes one route, too. The chance level is therefore that of a router that knows
nothing, with the same shares and the same likeness of routes within an id (``unknowing_routes``).

Shapes: n tokens, O operators, K classes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megachiar.analysis.calibration import correlation_within
from megachiar.analysis.resampling import Clusters, Estimate, estimate

NULL_DRAWS = 200
"""Unknowing routers that are drawn to find the chance level."""
NATS_PER_BIT = float(np.log(2))


@dataclass(frozen=True)
class Information:
    """What a feature says about the routes of one layer.

    Attributes:
        bits: mutual information of feature and route in this sample, in bits a token.
        route_bits: entropy of the routes, in bits: the most that there is to explain.
        chance: mean of ``bits`` for routers that know nothing.
        chance_low, chance_high: where 95 % of them lie.
        p_value: share of them that reach ``bits``, counting one more: at least 1 / (draws + 1).
        explained: share of the routes' entropy that the feature explains beyond chance: (bits - chance) / (route_bits -
            chance), adjusted mutual information; 0 by chance, 1 for a function of the feature. Its interval is over
            sequences and token ids.
    """

    bits: float
    route_bits: float
    chance: float
    chance_low: float
    chance_high: float
    p_value: float
    explained: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


def route_information(
    route: np.ndarray,
    feature: np.ndarray,
    clusters: Clusters,
    *,
    seed: int,
    is_token: bool = False,
    draws: int = NULL_DRAWS,
) -> Information:
    """Measure what a feature says about routes.

    Args:
        route: (n,) the operator of each token, from 0.
        feature: (n,) the class of each token, any integers.
        clusters: sequence and id of each token.
        seed: of the unknowing routers.
        is_token: whether the feature is the token id itself. Chance is then a router that knows nothing of ids either.
        draws: number of the unknowing routers.
    """
    _, classes = np.unique(feature, return_inverse=True)
    likeness = 0.0 if is_token else correlation_within(route.astype(np.float64), clusters.token)
    rng = np.random.default_rng([seed, len(route)])
    ones = np.ones(len(route))
    shares, (_, group) = np.bincount(route) / len(route), np.unique(clusters.token, return_inverse=True)
    drawn = (unknowing_routes(shares, group, likeness, rng) for _ in range(draws))
    null = np.array([mutual_information(routes, classes, ones) for routes in drawn])
    bits, chance = mutual_information(route, classes, ones), float(null.mean())

    def explained(weights: np.ndarray) -> float:
        room = route_entropy(route, weights) - chance
        return (mutual_information(route, classes, weights) - chance) / room if room > 1e-9 else float("nan")

    low, high = np.quantile(null, (0.025, 0.975)).tolist()
    return Information(
        bits=bits,
        route_bits=route_entropy(route, ones),
        chance=chance,
        chance_low=low,
        chance_high=high,
        p_value=(1 + int((null >= bits).sum())) / (draws + 1),
        explained=estimate(explained, clusters, seed),
    )


def mutual_information(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> float:
    """Return the mutual information in bits of two classes (n,), integers from 0, of tokens with ``weights`` (n,)."""
    columns = int(second.max()) + 1
    table = np.bincount(first * columns + second, weights, (int(first.max()) + 1) * columns).reshape(-1, columns)
    of_table, of_first, of_second = (_entropy(part) for part in (table.ravel(), table.sum(1), table.sum(0)))
    return max(0.0, of_first + of_second - of_table)


def route_entropy(route: np.ndarray, weights: np.ndarray) -> float:
    """Return the entropy in bits of the routes (n,) of tokens with ``weights`` (n,)."""
    return _entropy(np.bincount(route, weights))


def _entropy(counts: np.ndarray) -> float:
    total = float(counts.sum())
    p = counts[counts > 0] / total
    return -float(p @ np.log(p)) / NATS_PER_BIT


def unknowing_routes(shares: np.ndarray, group: np.ndarray, likeness: float, rng: np.random.Generator) -> np.ndarray:
    """Draw routes (n,) of a router that knows nothing.

    With probability sqrt(likeness) a token takes the route that was drawn for its id, and else one of its own. Two
    tokens of an id then have the correlation ``likeness``, as those of the measured routes have.

    Args:
        shares: (O,) of the operators.
        group: (n,) number of each token's id, from 0.
        likeness: intraclass correlation of routes within an id, from 0 to 1.
        rng: draws them.
    """
    bounds = np.cumsum(shares)[:-1]
    own = np.searchsorted(bounds, rng.random(len(group)), side="right")
    of_ids = np.searchsorted(bounds, rng.random(int(group.max()) + 1), side="right")
    return np.where(rng.random(len(group)) < likeness**0.5, of_ids[group], own)
