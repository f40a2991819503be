"""Turn measurements of a router into findings: a number, its interval, what chance shows, and a verdict in plain words.

Each function describes one routed layer from one side; ``routing_analysis`` calls them all.

Shapes: N = tokens, P = permutations of the channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from megachiar.analysis.calibration import CHANCE, LIKE_NOISE, Sample, correlation_within, effective_size, measure
from megachiar.analysis.information import route_information
from megachiar.analysis.permuted_channels import agreement_over_permutations
from megachiar.analysis.resampling import UNKNOWN, Clusters, Estimate, correlation, estimate, ranks, weighted_mean

NAN = float("nan")
COLLAPSED = 0.01
"""An operator with a smaller share of the tokens is not used: routing has collapsed."""
SURE = 0.01
"""A feature counts as known where fewer routers that know nothing show as much: there are several features a layer."""
SMALL = 0.01
"""A share of the routes' entropy below this is called small, however sure it is."""
ALIKE = 0.9
"""From this agreement beyond chance, or likeness within a token id, on two things count as the same."""
LITTLE = 0.1
"""Up to this agreement beyond chance, or likeness, two things have little to do with one another."""


@dataclass(frozen=True)
class Finding:
    """One number about one routed layer, or about all of them.

    Attributes:
        section: of the report, such as ``entropy``.
        layer: number of the layer, the first of the model being 1; None for all routed layers together.
        measure: what is measured, in words.
        value: the number; nan where it does not exist.
        low, high: its interval of 95 %; nan where there is none.
        chance: what a router that knows nothing shows; nan where there is no such thing.
        chance_low, chance_high: where 95 % of such routers lie; nan where that is not known.
        verdict: what it means.
        details: further numbers by name.
    """

    section: str
    layer: int | None
    measure: str
    value: float
    verdict: str
    low: float = NAN
    high: float = NAN
    chance: float = NAN
    chance_low: float = NAN
    chance_high: float = NAN
    details: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name; None for each number that does not exist."""
        return {name: _known(value) for name, value in asdict(self).items()}


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _known(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def of_estimate(section: str, layer: int | None, name: str, found: Estimate, verdict: str, **more: Any) -> Finding:
    """Return the finding of an estimate; ``more`` are further fields of ``Finding``."""
    return Finding(
        section=section,
        layer=layer,
        measure=name,
        value=found.value,
        low=found.low,
        high=found.high,
        verdict=verdict,
        **more,
    )


def share_findings(
    layer: int, operator: np.ndarray, operators: tuple[str, ...], clusters: Clusters, seed: int
) -> list[Finding]:
    """Describe which share of the tokens each operator takes, and whether routing has collapsed.

    Args:
        layer: its number, from 1.
        operator: (N,) the operator of each token.
        operators: their names.
        clusters: of the tokens.
        seed: of the intervals.
    """
    found = []
    for index, name in enumerate(operators):
        takes = (operator == index).astype(np.float64)
        share = estimate(lambda weights, takes=takes: weighted_mean(takes, weights), clusters, seed)  # type: ignore[misc]
        if share.is_below(COLLAPSED):
            verdict = "collapsed: hardly a token takes this operator"
        elif share.is_above(1 - COLLAPSED):
            verdict = "collapsed: this operator takes nearly every token"
        else:
            verdict = "in use"
        found.append(of_estimate("shares", layer, f"share of {name}", share, verdict))
    return found


def entropy_findings(layer: int, entropy: np.ndarray, noise: Sample, clusters: Clusters) -> list[Finding]:
    """Compare H (N,) with white noise, as ``megachiar calibrate`` does, and say how much of it the token id decides."""
    likeness = correlation_within(entropy, clusters.token)
    counts = np.unique(clusters.token, return_counts=True)[1]
    independent = effective_size(counts, likeness)
    place = measure(f"layer {layer}", Sample(entropy), independent, noise, ())
    bound = max(LIKE_NOISE, CHANCE / independent**0.5)
    distance = Finding(
        section="entropy",
        layer=layer,
        measure="distance of H from white noise",
        value=place.noise_distance,
        chance=CHANCE / independent**0.5,
        verdict="like white noise: a threshold on H is a hash of the row" if place.like_noise else "unlike white noise",
        details={
            "mean": place.measured.mean,
            "deviation": place.measured.deviation,
            "like_noise": float(place.like_noise),
            "bound": bound,
        },
    )
    worth = Finding(
        section="entropy",
        layer=layer,
        measure="independent tokens that would tell as much",
        value=independent,
        verdict=f"of {len(entropy):,} tokens",
    )
    if likeness > ALIKE:
        verdict = "H is a table: the token id decides it"
    elif likeness > LITTLE:
        verdict = "the token id decides this share of H, its context the rest"
    else:
        verdict = "H has little to do with the token id"
    table = Finding(
        section="entropy", layer=layer, measure="likeness of H within a token id", value=likeness, verdict=verdict
    )
    return [distance, worth, table]


def channel_findings(layer: int, operator: np.ndarray, permuted: np.ndarray, like_noise: bool) -> list[Finding]:
    """Compare routes (N,) with those of permuted channels (P, N)."""
    found = agreement_over_permutations(operator, permuted)
    beyond = found.beyond_chance
    if not np.isfinite(beyond.value):
        verdict = "one operator takes all tokens: nothing to compare"
    elif beyond.low > ALIKE:
        verdict = "the order of the channels does not matter"
    elif beyond.is_above(0):
        verdict = "the order of the channels matters in part"
    elif like_noise:
        verdict = "no more than chance, and H is like noise: a hash of the row"
    else:
        verdict = "no more than chance: the routes belong to this order of the channels"
    return [
        Finding(
            section="channels",
            layer=layer,
            measure="agreement with routes of permuted channels",
            value=found.agreement,
            chance=found.chance,
            chance_low=found.chance - 2 * found.spread,
            chance_high=found.chance + 2 * found.spread,
            verdict=verdict,
        ),
        of_estimate("channels", layer, "agreement beyond chance", beyond, verdict, chance=0.0),
    ]


def information_findings(
    layer: int, operator: np.ndarray, features: Mapping[str, np.ndarray], clusters: Clusters, seed: int
) -> list[Finding]:
    """Say how much each feature explains of the routes beyond what it explains of routes that know nothing.

    Args:
        layer: its number, from 1.
        operator: (N,) the operator of each token.
        features: (N,) the class of each token, by the name of the feature; ``token id`` is the id itself.
        clusters: of the tokens.
        seed: of the routers that know nothing.
    """
    found = []
    for name, classes in features.items():
        result = route_information(operator, classes, clusters, seed=seed, is_token=name == "token id")
        room = result.route_bits - result.chance
        explained = result.explained
        if not np.isfinite(explained.value):
            verdict, room = "one operator takes all tokens: nothing to explain", NAN
        elif result.p_value > SURE:
            verdict = "no more than for routes that know nothing"
        elif explained.value < SMALL:
            verdict = "sure, but small"
        elif explained.value > ALIKE:
            verdict = "decides the route"
        else:
            verdict = f"explains {explained.value:.0%} of the routes"
        details = {"bits": result.bits, "route_bits": result.route_bits, "chance_bits": result.chance}
        found.append(
            of_estimate(
                "information",
                layer,
                f"route explained by {name}",
                explained,
                verdict,
                chance=0.0,
                chance_low=(result.chance_low - result.chance) / room,
                chance_high=(result.chance_high - result.chance) / room,
                details={**details, "p_value": result.p_value},
            )
        )
    return found


def loss_findings(
    layer: int, attends: np.ndarray, entropy: np.ndarray, losses: np.ndarray, clusters: Clusters, seed: int
) -> list[Finding]:
    """Compare the next-token losses of tokens that attend with those of the others, and loss with H, all (N,)."""

    def difference(weights: np.ndarray) -> float:
        return weighted_mean(losses, weights * attends) - weighted_mean(losses, weights * ~attends)

    gap = estimate(difference, clusters, seed)
    verdict = sign_verdict(
        gap, "attention goes to tokens that are harder to continue", "attention goes to easier tokens"
    )
    relation = rank_correlation(entropy, losses, clusters, seed)
    related = sign_verdict(relation, "higher H, higher loss", "higher H, lower loss", "no relation that is sure")
    return [
        of_estimate("loss", layer, "loss where attention is taken, minus the rest", gap, verdict, chance=0.0),
        of_estimate("loss", layer, "rank correlation of H with the loss", relation, related, chance=0.0),
    ]


def distance_findings(
    layer: int, entropy: np.ndarray, distances: Mapping[str, np.ndarray], clusters: Clusters, seed: int
) -> list[Finding]:
    """Correlate H with how far back a baseline's attention looks, among tokens of the same position.

    Args:
        layer: its number, from 1.
        entropy: (S, T) H of this layer.
        distances: (S, T) mean attention distance, by what it is the distance of.
        clusters: of the S * T tokens.
        seed: of the intervals.
    """
    found = []
    for name, distance in distances.items():
        first, second = (ranks_within_positions(part).ravel() for part in (entropy, distance))
        relation = rank_correlation(first, second, clusters, seed)
        verdict = sign_verdict(
            relation, "higher H, longer dependencies", "higher H, shorter dependencies", "no relation that is sure"
        )
        measured = f"rank correlation of H with a baseline's attention distance, {name}"
        found.append(of_estimate("distance", layer, measured, relation, verdict, chance=0.0))
    return found


def stability_finding(
    layer: int, steps: tuple[int, int], before: np.ndarray, after: np.ndarray, clusters: Clusters, seed: int
) -> Finding:
    """Compare the routes (N,) of the same tokens in two checkpoints, of the given steps."""
    operators = 1 + max(int(before.max()), int(after.max()))
    same = (before == after).astype(np.float64)
    one_hot = [np.eye(operators)[routes] for routes in (before, after)]

    def beyond_chance(weights: np.ndarray) -> float:
        first, second = (weights @ part / weights.sum() for part in one_hot)
        chance = float(first @ second)
        return (weighted_mean(same, weights) - chance) / (1 - chance) if chance < 1 - 1e-9 else NAN

    kappa = estimate(beyond_chance, clusters, seed)
    if not np.isfinite(kappa.value):
        verdict = "one operator takes all tokens: nothing to compare"
    elif kappa.value > ALIKE:
        verdict = "settled: nearly all tokens keep their route"
    elif kappa.is_below(LITTLE) or not kappa.is_above(0):
        verdict = "routes are drawn anew between these steps"
    else:
        verdict = "some routes move"
    name = f"routes kept from step {steps[0]:,} to {steps[1]:,}, beyond chance"
    return of_estimate("stability", layer, name, kappa, verdict, chance=0.0, details={"agreement": float(same.mean())})


def rank_correlation(first: np.ndarray, second: np.ndarray, clusters: Clusters, seed: int) -> Estimate:
    """Return Spearman's correlation of two numbers (N,) of each token; those that are nan are left out."""
    known = np.isfinite(first) & np.isfinite(second)
    if not known.any():
        return UNKNOWN
    x, y = ranks(first[known]), ranks(second[known])
    return estimate(lambda weights: correlation(x, y, weights), clusters.select(known), seed)


def ranks_within_positions(values: np.ndarray) -> np.ndarray:
    """Return the ranks of ``values`` (S, T) among those of one position, float64: a later token may look further."""
    return np.stack([ranks(column) for column in values.T], 1)


def sign_verdict(found: Estimate, above: str, below: str, unclear: str = "nothing that is sure") -> str:
    """Say on which side of 0 an estimate is, or that it is not sure."""
    if not np.isfinite(found.value):
        return "nothing to compare"
    return above if found.is_above(0) else below if found.is_below(0) else unclear
