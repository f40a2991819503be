"""Run a model with other routes than its own, in all routed layers at once, and measure the change of the loss.

Single switches (``route_value``) say what one route is worth while all others stay; this says what all routes together
are worth. A model was trained with its own routes, and may do worse with others for that reason alone.

Shapes: R = routed layers, S = sequences, T = tokens, B = sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from megachiar.analysis.resampling import Estimate, estimate, weighted_mean
from megachiar.analysis.route_value import check_switchable, routed_layers
from megachiar.analysis.routed_tokens import RoutedTokens, batches
from megachiar.analysis.windows import Windows
from megachiar.model import ChiarFormer

COINS = 3
"""Draws of a coin for each token, whose losses are averaged."""


def intervention_routes(routed: RoutedTokens, seed: int) -> dict[str, list[np.ndarray]]:
    """Return the routes that a model is run with: lists of (R, S, T) int8 by what is done to the routes.

    Of several routes under one name the losses are averaged. The coin gives each layer the shares of its own routes.
    """
    own, operators = routed.operator, routed.operators
    dct, attention = operators.index("dct"), operators.index("attention")
    inverted = np.where(own == dct, attention, np.where(own == attention, dct, own)).astype(np.int8)
    rng = np.random.default_rng([seed, 2])
    coins = []
    for _ in range(COINS):
        layers = [rng.permutation(layer.ravel()).reshape(layer.shape) for layer in own]
        coins.append(np.stack(layers))
    return {
        "attention for all": [np.full_like(own, attention)],
        "DCT mixing for all": [np.full_like(own, dct)],
        "a coin for each token": coins,
        "attention and DCT mixing exchanged": [inverted],
    }


def measure_interventions(
    model: ChiarFormer,
    routed: RoutedTokens,
    windows: Windows,
    *,
    seed: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Estimate]:
    """Return the change of the mean loss, in nats a token, when a model takes other routes than its own.

    Args:
        model: in evaluation mode.
        routed: the tokens with the model's own routes and losses.
        windows: of these tokens.
        seed: of the coin and of the intervals.
        batch_size: sequences of a forward pass.
        advance: is told of sequences that have been run.

    Returns:
        The change by what was done, with an interval over sequences and token ids.

    Raises:
        UserError: the router is soft.
    """
    check_switchable(model)
    valid = np.isfinite(routed.losses).ravel()
    clusters = routed.clusters.select(valid)
    found = {}
    for name, variants in intervention_routes(routed, seed).items():
        losses = np.mean([_losses(model, windows, routes, batch_size, advance) for routes in variants], 0)
        change = (losses - routed.losses).ravel()[valid]

        def mean_change(weights: np.ndarray, change: np.ndarray = change) -> float:
            return weighted_mean(change, weights)

        found[name] = estimate(mean_change, clusters, seed)
    return found


@torch.inference_mode()
def _losses(
    model: ChiarFormer,
    windows: Windows,
    routes: np.ndarray,
    batch_size: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Return the loss (S, T) fp64 of each token with the given routes (R, S, T)."""
    layers, found, first = routed_layers(model), [], 0
    for batch in batches(model, windows, batch_size):
        count = len(batch[0])
        part = torch.from_numpy(routes[:, first : first + count]).long().flatten(1).to(batch[0].device)
        forced = {layer.name: route for layer, route in zip(layers.values(), part, strict=True)}
        losses = model(*batch, routes=forced).token_losses
        assert losses is not None, "there are targets"
        found.append(losses.double().cpu().numpy())
        first += count
        advance(count)
    return np.concatenate(found)
