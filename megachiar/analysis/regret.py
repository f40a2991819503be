"""Measure how far a router is from the best choice of the same share: 0 is perfect, 1 is a coin, and more is worse.

    regret = (loss - loss of the oracle) / (loss of a coin - loss of the oracle)       at equal share of attention

Losses are to first order: each token's value (loss with DCT mixing minus loss with attention, all other routes as the
router has them) counts where the token takes attention, and values add up as if switches did not act on each other.
The oracle gives attention to the tokens of the highest measured values. It knows the targets, so that no router of a
causal model reaches 0. The coin is the expectation of a router that hashes its rows.

Shapes: n tokens.
"""

from __future__ import annotations

import numpy as np


def regret(values: np.ndarray, attends: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the regret of routes.

    Args:
        values: (n,) value of attention for each token, in nats.
        attends: (n,) bool, whether the router gives it attention.
        weights: (n,) how often each token counts; once each if None.

    Returns:
        The regret; nan where there is nothing to choose: no token or all take attention, or all have one value.
    """
    weights = np.ones(len(values)) if weights is None else weights
    total, taken = float(weights.sum()), float(weights @ attends)
    if not 0 < taken < total:
        return float("nan")
    best = _value_of_best(values, taken, weights)
    coin = float(weights @ values) * taken / total
    own = float((weights * attends) @ values)
    return (best - own) / (best - coin) if best - coin > 1e-12 * (1 + abs(best)) else float("nan")


def regret_of_scores(values: np.ndarray, scores: np.ndarray, share: float, weights: np.ndarray | None = None) -> float:
    """Return the regret of a router that gives attention to the ``share`` of tokens with the highest ``scores`` (n,).

    It compares what might predict the value, such as H or the output of a probe, without training a router with it.
    """
    order = np.argsort(scores, kind="stable")
    attends = np.zeros(len(values), bool)
    attends[order[len(order) - round(share * len(order)) :]] = True
    return regret(values, attends, weights)


def _value_of_best(values: np.ndarray, amount: float, weights: np.ndarray) -> float:
    """Return the largest sum of values that tokens of a total weight of ``amount`` can have."""
    order = np.argsort(-values, kind="stable")
    before = np.cumsum(weights[order]) - weights[order]
    counted = np.clip(amount - before, 0, weights[order])
    return float(counted @ values[order])
