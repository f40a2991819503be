"""Measure what routes are worth: the loss when single tokens are switched to another operator.

The value of attention for a token in a layer is

    value = loss with DCT mixing there - loss with attention there           all other routes stay as they are

in nats, summed over the targets of its sequence: a switch changes the token's own prediction and, through attention in
later layers, those of later tokens. It is positive where attention helps. The routes of later layers are held, too:
routers that would decide otherwise after the switch do not.

A sequence is run with its switches as one batch whose first row has no switch, so that all rows are computed alike.
With ``meta_router.pool: batch`` the gate is that of the sequence alone.

Shapes: R = routed layers, S = sequences, T = tokens of a sequence, B = rows of a batch, n = tokens that are switched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megachiar.analysis.routed_tokens import RoutedTokens
from megachiar.errors import UserError
from megachiar.model import ChiarFormer
from megachiar.model.layer import RoutedLayer


@dataclass(frozen=True)
class RouteValues:
    """The values of single routes of n tokens in one layer.

    Attributes:
        layer: index of the layer, from 0.
        sequence, position: (n,) int64, which token was switched.
        operator: (n,) int64, the operator that the router gave it, from 0 in the config's order.
        entropy: (n,) fp64, spectral entropy H of its row in this layer.
        value: (n,) fp64, value of attention against DCT mixing, in nats.
    """

    layer: int
    sequence: np.ndarray
    position: np.ndarray
    operator: np.ndarray
    entropy: np.ndarray
    value: np.ndarray


@torch.inference_mode()
def route_values(
    model: ChiarFormer,
    routed: RoutedTokens,
    targets: np.ndarray,
    tokens: np.ndarray,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[RouteValues]:
    """Switch single tokens in every routed layer and measure the loss.

    Args:
        model: in evaluation mode, whole and on one rank. fp32 or fp64: 16 bits are too coarse for these differences.
        routed: the tokens of the text with the model's own routes, which all other tokens keep.
        targets: (S, T) int64 of these tokens.
        tokens: (n, 2) int64, sequence and position of each token that is switched, in every routed layer.
        batch_size: most sequences in a forward pass.
        advance: is told of sequences that have been run.

    Returns:
        The values in each routed layer, of the tokens in the order of their sequences and positions.

    Raises:
        UserError: the router is soft: every token takes all operators, and there is nothing to switch.
    """
    check_switchable(model)
    sequence, position = tokens[np.lexsort(tokens.T[::-1])].T
    parts = []
    for number in np.unique(sequence).tolist():
        places = position[sequence == number]
        parts.append(_values_of_sequence(model, routed, targets, number, places, batch_size, advance))
    values = np.concatenate(parts, 1)  # (R, n)
    return [
        RouteValues(
            layer=index,
            sequence=sequence,
            position=position,
            operator=routed.operator[place, sequence, position].astype(np.int64),
            entropy=routed.entropy[place, sequence, position],
            value=values[place],
        )
        for place, index in enumerate(routed.layers)
    ]


def choose_tokens(targets: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose ``count`` tokens with a target at random, spread evenly over the sequences.

    Args:
        targets: (sequences, T) int64, negative where there is none.
        count: number of tokens; all tokens where there are fewer.
        seed: of the choice.

    Returns:
        (n, 2) int64, sequence and position.
    """
    rng = np.random.default_rng([seed, 1])
    turns: list[tuple[float, int, int]] = []
    for sequence in range(len(targets)):
        positions = rng.permutation(np.flatnonzero(targets[sequence] >= 0)).tolist()
        offset = rng.random()  # the sequences take turns, in a random order
        turns += [(turn + offset, sequence, position) for turn, position in enumerate(positions)]
    chosen = sorted((sequence, position) for _, sequence, position in sorted(turns)[:count])
    return np.array(chosen, np.int64).reshape(-1, 2)


def check_switchable(model: ChiarFormer) -> None:
    """Check that tokens of ``model`` take one operator each.

    Raises:
        UserError: its router is soft.
    """
    if model.config.router.kind == "soft":
        raise UserError(
            "model.router.kind", "is soft: every token takes all operators", "measure a router that chooses one"
        )


def routed_layers(model: ChiarFormer) -> dict[int, RoutedLayer]:
    """Return the routed layers of ``model`` by index, from 0."""
    return {index: layer for index, layer in enumerate(model.layers) if isinstance(layer, RoutedLayer)}


def _values_of_sequence(
    model: ChiarFormer,
    routed: RoutedTokens,
    targets: np.ndarray,
    sequence: int,
    positions: np.ndarray,
    batch_size: int,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Return the values (R, n) of the routes at ``positions`` (n,) of one sequence."""
    own = routed.operator[:, sequence]  # (R, T)
    pair = routed.operators.index("dct"), routed.operators.index("attention")
    wanted = [(place, int(position), o) for place in range(len(own)) for position in positions for o in pair]
    switches = [(place, position, o) for place, position, o in wanted if own[place, position] != o]
    losses: dict[tuple[int, int, int], float] = {}
    for part in _parts(switches, max(1, batch_size - 1)):
        routes = np.repeat(own[:, None], 1 + len(part), axis=1)  # (R, B, T)
        for row, (place, position, operator) in enumerate(part, 1):
            routes[place, row, position] = operator
        result = _losses(model, routed.ids[sequence], targets[sequence], routes)
        # What is kept is the difference to the row without a switch, which every batch has.
        losses |= dict(zip(part, (result[1:] - result[0]).tolist(), strict=True))
        advance(len(part) + 1)
    change = np.array([losses.get(switch, 0.0) for switch in wanted]).reshape(len(own), len(positions), 2)
    return change[..., 0] - change[..., 1]


def _losses(model: ChiarFormer, tokens: np.ndarray, targets: np.ndarray, routes: np.ndarray) -> torch.Tensor:
    """Return the summed loss (B,) fp64 of a sequence (T,) with each of B given routes (R, B, T)."""
    device, rows = next(model.parameters()).device, routes.shape[1]
    inputs, wanted = (torch.from_numpy(part).to(device).expand(rows, -1) for part in (tokens, targets))
    of_layers = torch.from_numpy(routes).long().flatten(1).to(device)
    forced = {layer.name: route for layer, route in zip(routed_layers(model).values(), of_layers, strict=True)}
    losses = model(inputs, wanted, routes=forced).token_losses
    assert losses is not None, "there are targets"
    return losses.double().sum(1).cpu()


def _parts(items: Sequence[tuple[int, int, int]], size: int) -> Iterator[Sequence[tuple[int, int, int]]]:
    """Cut ``items`` into parts of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
