"""Turn the values of single routes and of other routes for all tokens into findings.

Shapes: n = tokens that were switched.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megachiar.analysis.regret import regret, regret_of_scores
from megachiar.analysis.resampling import Clusters, Estimate, estimate, weighted_mean
from megachiar.analysis.route_value import RouteValues
from megachiar.analysis.routing_findings import Finding, of_estimate, rank_correlation, sign_verdict
from megachiar.analysis.value_predictors import PredictorInputs, predictions


def value_findings(
    values: RouteValues, attention: int, ids: np.ndarray, is_threshold: bool, seed: int
) -> list[Finding]:
    """Describe the values of single routes in one layer: their mean, whether H knows them, and the router's regret.

    Args:
        values: of the layer.
        attention: number of the operator attention.
        ids: (S, T) token ids.
        is_threshold: whether the router is a threshold on H, whose regret need not be told twice.
        seed: of the intervals.
    """
    layer, value = values.layer + 1, values.value
    attends = values.operator == attention
    clusters = Clusters(sequence=values.sequence, token=ids[values.sequence, values.position])
    mean = estimate(lambda weights: weighted_mean(value, weights), clusters, seed)
    gap = estimate(
        lambda weights: weighted_mean(value, weights * attends) - weighted_mean(value, weights * ~attends),
        clusters,
        seed,
    )
    relation = rank_correlation(values.entropy, value, clusters, seed)
    share = float(attends.mean())
    own = estimate(lambda weights: regret(value, attends, weights), clusters, seed)
    verdict = sign_verdict(mean, "attention helps on average", "attention harms on average")
    found = [
        of_estimate("value", layer, "value of attention for a token, nats", mean, verdict, chance=0.0),
        of_estimate(
            "value",
            layer,
            "value where attention is taken, minus the rest",
            gap,
            sign_verdict(gap, "attention goes where it is worth more", "attention goes where it is worth less"),
            chance=0.0,
        ),
        of_estimate(
            "value",
            layer,
            "rank correlation of H with the value",
            relation,
            sign_verdict(relation, "higher H, more worth attending", "higher H, less worth attending"),
            chance=0.0,
        ),
        _right_choices(layer, values, attends, clusters, seed),
        of_estimate(
            "value",
            layer,
            "regret (0 the oracle, 1 a coin)",
            own,
            regret_verdict(own, len(value)),
            chance=1.0,
            details={"switches": float(len(value)), "share": share},
        ),
    ]
    if is_threshold:
        return found
    by_entropy = estimate(lambda weights: regret_of_scores(value, values.entropy, share, weights), clusters, seed)
    name, verdict = "regret of a threshold on H, at this share", regret_verdict(by_entropy, len(value))
    return [*found, of_estimate("value", layer, name, by_entropy, verdict, chance=1.0)]


def predictor_findings(
    values: RouteValues, inputs: PredictorInputs, attention: int, ids: np.ndarray, seed: int
) -> list[Finding]:
    """Say of each predictor how far a router by it would be from the best choice, at the share of the run's router.

    Args:
        values: of the routes that were switched in the layer.
        inputs: what is known about the tokens there.
        attention: number of the operator attention.
        ids: (S, T) token ids.
        seed: of the intervals and of ties.
    """
    layer, value = values.layer + 1, values.value
    tokens = np.stack([values.sequence, values.position], 1)
    clusters = Clusters(sequence=values.sequence, token=ids[values.sequence, values.position])
    share = float((values.operator == attention).mean())
    share = share if 0 < share < 1 else 0.5
    relation = rank_correlation(inputs.values[values.sequence, values.position], value, clusters, seed)
    found = [
        of_estimate(
            "predictors",
            layer,
            "rank correlation of values to first order with those of switches",
            relation,
            sign_verdict(relation, "what predictors are fitted to says something", "the fit misleads"),
            chance=0.0,
        )
    ]
    ties = np.random.default_rng([seed, values.layer]).random(len(value))
    for name, predicted in predictions(inputs, ids, tokens).items():
        scores = np.lexsort((ties, predicted)).argsort()
        regret_there = estimate(
            lambda weights, scores=scores: regret_of_scores(value, scores, share, weights),  # type: ignore[misc]
            clusters,
            seed,
        )
        verdict = regret_verdict(regret_there, len(value))
        found.append(
            of_estimate(
                "predictors",
                layer,
                f"regret of a router by {name}",
                regret_there,
                verdict,
                chance=1.0,
                details={"share": share},
            )
        )
    return found


def _right_choices(layer: int, values: RouteValues, attends: np.ndarray, clusters: Clusters, seed: int) -> Finding:
    """Return how many tokens have the operator that is better for them, beside independent choices of these shares."""
    better = values.value > 0
    right = (better == attends).astype(np.float64)

    def beyond_chance(weights: np.ndarray) -> float:
        share, of_better = weighted_mean(attends.astype(np.float64), weights), weighted_mean(better * 1.0, weights)
        return weighted_mean(right, weights) - (share * of_better + (1 - share) * (1 - of_better))

    ones = np.ones(len(right))
    beyond = estimate(beyond_chance, clusters, seed)
    chance = float(right.mean()) - beyond_chance(ones)
    verdict = sign_verdict(beyond, "better than chance", "worse than chance", "no better than chance")
    return Finding(
        section="value",
        layer=layer,
        measure="tokens with the better operator",
        value=float(right.mean()),
        low=chance + beyond.low,
        high=chance + beyond.high,
        chance=chance,
        verdict=verdict,
        details={"attention_is_better": float(better.mean())},
    )


def intervention_findings(changes: Mapping[str, Estimate]) -> list[Finding]:
    """Describe the change of the loss with other routes in all routed layers, by what was done."""
    found = []
    for name, change in changes.items():
        verdict = sign_verdict(change, "the model's own routes are better", "the model would be better so")
        found.append(of_estimate("other routes", None, f"{name}: loss, nats a token", change, verdict, chance=0.0))
    return found


def regret_verdict(found: Estimate, switches: int) -> str:
    """Say what a regret means."""
    if not np.isfinite(found.value):
        return "one operator takes all tokens: no choice to judge"
    if found.is_below(1):
        return "knows something: better than a coin"
    if found.is_above(1):
        return "worse than a coin"
    return f"no better than a coin, as far as {switches:,} switches tell"
