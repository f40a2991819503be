"""Measure what routes are worth: the loss when single tokens are switched to another operator.

The value of attention for a token in a layer is

    value = loss with DCT mixing there - loss with attention there           all other routes stay as they are

in nats, summed over the targets of its sequence: a switch changes the token's own prediction and, through attention in
later layers, those of later tokens. It is positive where attention helps. The routes of later layers are held, too:
routers that would decide otherwise after the switch do not.

A sequence is run with its switches as one batch whose first row has no switch, so that all rows are computed alike.

Shapes: B rows of a batch, T tokens of a sequence, n switches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megachiar.analysis.route_trace import trace_routes
from megachiar.errors import UserError
from megachiar.model import ChiarFormer
from megachiar.model.layer import RoutedLayer, Routes


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
    inputs: np.ndarray,
    targets: np.ndarray,
    tokens: np.ndarray,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> list[RouteValues]:
    """Switch single tokens in every routed layer and measure the loss.

    Args:
        model: in evaluation mode, whole and on one rank. fp32 or fp64: 16 bits are too coarse for these differences.
        inputs, targets: (sequences, T) int64.
        tokens: (n, 2) int64, sequence and position of each token that is switched, in every routed layer.
        batch_size: most sequences in a forward pass.
        advance: is told of sequences that have been run.

    Returns:
        The values in each routed layer, of the tokens in the order of their sequences and positions.

    Raises:
        UserError: the router is soft: every token takes all operators, and there is nothing to switch.
    """
    check_switchable(model)
    layers = routed_layers(model)
    tokens = tokens[np.lexsort(tokens.T[::-1])]
    found: dict[int, list[tuple[np.ndarray, ...]]] = {index: [] for index in layers}
    for sequence in np.unique(tokens[:, 0]).tolist():
        positions = tokens[tokens[:, 0] == sequence, 1]
        device = next(model.parameters()).device
        row, wanted = (torch.from_numpy(part[sequence : sequence + 1]).to(device) for part in (inputs, targets))
        for index, values in _of_sequence(model, row, wanted, positions, batch_size, advance).items():
            found[index].append((np.full(len(positions), sequence), positions, *values))
    results = []
    for index, parts in found.items():
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        results.append(RouteValues(index, *columns))
    return results


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


def _of_sequence(
    model: ChiarFormer,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    positions: np.ndarray,
    batch_size: int,
    advance: Callable[[int], None],
) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return operators, entropies and values (n,) at ``positions`` (n,) of one sequence (1, T), by layer."""
    layers = routed_layers(model)
    trace = trace_routes(model, tokens, targets)
    routes = {layer.name: trace.operator[index].flatten() for index, layer in layers.items()}
    taken = {index: trace.operator[index, 0].cpu().numpy()[positions] for index in layers}
    entropy = {index: trace.entropy[index, 0].double().cpu().numpy()[positions] for index in layers}
    pair = trace.operators.index("dct"), trace.operators.index("attention")
    places = range(len(positions))
    wanted = [(index, place, operator) for index in layers for place in places for operator in pair]
    switched = [change for change in wanted if taken[change[0]][change[1]] != change[2]]
    losses: dict[tuple[int, int, int], float] = {}
    for part in _parts(switched, max(1, batch_size - 1)):
        changes = [(layers[index].name, int(positions[place]), operator) for index, place, operator in part]
        result = _losses(model, tokens, targets, routes, changes)
        # What is kept is the difference to the row without a switch, which every batch has.
        losses |= dict(zip(part, (result[1:] - result[0]).tolist(), strict=True))
        advance(len(part) + 1)
    found = {}
    for index in layers:
        with_dct, with_attention = ([losses.get((index, place, o), 0.0) for place in places] for o in pair)
        value = np.array(with_dct) - np.array(with_attention)
        found[index] = (taken[index], entropy[index], value)
    return found


def _losses(
    model: ChiarFormer,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    routes: Routes,
    changes: Sequence[tuple[str, int, int]],
) -> torch.Tensor:
    """Return the summed loss (1 + n,) fp64 of a sequence (1, T) as it is routed, and with each of n changed routes.

    Args:
        model: of the sequence.
        tokens, targets: (1, T).
        routes: (T,) by the name of the layer.
        changes: layer, position and operator of each.
    """
    rows, length = 1 + len(changes), tokens.shape[1]
    forced = {name: route.repeat(rows) for name, route in routes.items()}
    for row, (name, position, operator) in enumerate(changes, 1):
        forced[name][row * length + position] = operator
    losses = model(tokens.expand(rows, -1), targets.expand(rows, -1), routes=forced).token_losses
    return losses.double().sum(1).cpu()


def _parts(items: Sequence[tuple[int, int, int]], size: int) -> Iterator[Sequence[tuple[int, int, int]]]:
    """Cut ``items`` into parts of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
