"""Trace the routes of tokens: what the routers of a model decide in its own forward pass, token by token.

Nothing is computed a second time. Hooks watch the modules of the model, so that a trace has what the model did.

Shapes: L = layers, B = sequences, T = tokens of a sequence in a pass, N = B * T rows, O = operators of the config.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from megachiar.kernels.spectral import spectral_entropy
from megachiar.model import ChiarFormer
from megachiar.model.layer import FixedLayer, RoutedLayer


@dataclass(frozen=True)
class RouteTrace:
    """The routes of the tokens of one forward pass, on the model's device and without gradient.

    Attributes:
        operators: the names of the O operators, which ``operator`` counts from 0, by rising spectral entropy.
        routed: whether each of the L layers routes; in the others all tokens take one operator.
        operator: (L, B, T) int64, the operator that each token took. A soft router computes all operators for every
            token; the one with the largest gate stands here.
        entropy: (L, B, T) fp32 or fp64, spectral entropy H of the hidden state that entered the layer. In a routed
            layer it is the router's own number, in the others a measurement that decides nothing.
        gates: (L, B, T, O), the softmax weights of soft and hard routers; nan in layers without. None where no layer
            has any.
        meta_gate: (B, T), the gate g of the MetaRouter of layer 1; None where the model has none.
        token_losses: (B, T) fp32 or fp64, cross-entropy in nats against the targets, 0 where there is none; None where
            the pass had no targets.
        is_soft: whether the router is soft, so that ``gates`` say how much of each operator a token took.
        bounds: of each layer, the thresholds that its router compares H with; none where something else decides.
    """

    operators: tuple[str, ...]
    routed: tuple[bool, ...]
    operator: torch.Tensor
    entropy: torch.Tensor
    gates: torch.Tensor | None
    meta_gate: torch.Tensor | None
    token_losses: torch.Tensor | None
    is_soft: bool = False
    bounds: tuple[tuple[float, ...], ...] = ()

    def tokens(self, chosen: slice) -> RouteTrace:
        """Return the routes of the tokens at the positions ``chosen`` of each sequence."""
        return replace(
            self,
            operator=self.operator[:, :, chosen],
            entropy=self.entropy[:, :, chosen],
            gates=None if self.gates is None else self.gates[:, :, chosen],
            meta_gate=None if self.meta_gate is None else self.meta_gate[:, chosen],
            token_losses=None if self.token_losses is None else self.token_losses[:, chosen],
        )


@torch.no_grad()
def trace_routes(model: ChiarFormer, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> RouteTrace:
    """Run ``model`` over ``tokens`` and return their routes.

    Args:
        model: a whole model on one rank, in evaluation mode.
        tokens: (B, T) int64, at most ``max_sequence_length`` a sequence, on any device.
        targets: (B, T) int64, -100 where there is none; with them the trace has the losses of the tokens.
    """
    device = next(model.parameters()).device
    with record_routes(model) as passes:
        model(tokens.to(device), None if targets is None else targets.to(device))
    return passes[0]


@contextmanager
def record_routes(model: ChiarFormer) -> Iterator[list[RouteTrace]]:
    """Record every forward pass that is made within the context, those of generation included.

    Yields:
        A list, to which each pass adds its trace. A pass that reads new tokens after a cache has those tokens alone.
    """
    passes: list[RouteTrace] = []
    pass_ = _Pass(model)

    def finish(_: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> None:
        passes.append(pass_.finish(arguments[0] if arguments else named["tokens"], output))

    hooks = [model.register_forward_hook(finish, with_kwargs=True)]
    for index, layer in enumerate(model.layers):
        hooks += pass_.watch(index, layer)
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


class _Pass:
    """What the hooks have seen of the forward pass that is running: rows (N,) of each layer by its index."""

    def __init__(self, model: ChiarFormer):
        self.config = model.config
        self.operators = model.config.router.operators
        self.layers = model.layers
        self.routed = tuple(isinstance(layer, RoutedLayer) for layer in model.layers)
        self.operator: dict[int, torch.Tensor] = {}
        self.entropy: dict[int, torch.Tensor] = {}
        self.gates: dict[int, torch.Tensor] = {}
        self.meta_gate: torch.Tensor | None = None

    def watch(self, index: int, layer: nn.Module) -> list[Any]:
        """Put hooks on a layer and return their handles."""
        if isinstance(layer, RoutedLayer):
            decided = layer.router.register_forward_hook(partial(self._see_decision, index))
            # A soft router takes no route of its own: its layer leaves last_routes as it is.
            return [decided, layer.register_forward_hook(partial(self._see_routes, index))]
        hooks = [layer.register_forward_pre_hook(partial(self._see_fixed, index))]
        if isinstance(layer, FixedLayer) and layer.meta_router is not None:
            hooks.append(layer.meta_router.register_forward_hook(self._see_meta_gate))
        return hooks

    def _see_decision(self, index: int, router: nn.Module, arguments: tuple, decision: Any) -> None:
        self.operator[index], self.entropy[index] = decision.operator, decision.entropy
        if decision.gates is not None:
            self.gates[index] = decision.gates.detach()

    def _see_routes(self, index: int, layer: RoutedLayer, arguments: tuple, output: Any) -> None:
        if layer.router.kind != "soft" and layer.last_routes is not None:
            self.operator[index] = layer.last_routes

    def _see_fixed(self, index: int, layer: FixedLayer, arguments: tuple) -> None:
        rows, dct = arguments[0].detach(), self.config.dct
        name = "attention" if layer.is_attention else "dct"
        self.operator[index] = torch.full((len(rows),), self.operators.index(name), device=rows.device)
        self.entropy[index] = spectral_entropy(rows, dct.entropy_dc_weight, dct.entropy_epsilon)

    def _see_meta_gate(self, meta_router: nn.Module, arguments: tuple, gate: torch.Tensor) -> None:
        self.meta_gate = gate.detach().expand(len(arguments[0]), 1)

    def finish(self, tokens: torch.Tensor, output: Any) -> RouteTrace:
        """Return the trace of the pass over ``tokens`` (B, T), and forget it."""
        layers = range(len(self.routed))
        gates = None
        if self.gates:
            like = next(iter(self.gates.values()))
            empty = torch.full_like(like, torch.nan)
            gates = torch.stack([self.gates.get(index, empty) for index in layers]).unflatten(1, tokens.shape)
        trace = RouteTrace(
            operators=self.operators,
            routed=self.routed,
            operator=torch.stack([self.operator[index] for index in layers]).unflatten(1, tokens.shape),
            entropy=torch.stack([self.entropy[index] for index in layers]).unflatten(1, tokens.shape),
            gates=gates,
            meta_gate=None if self.meta_gate is None else self.meta_gate.reshape(tokens.shape),
            token_losses=output.token_losses,
            is_soft=any(self.routed) and self.config.router.kind == "soft",
            bounds=tuple(map(_bounds_of, self.layers)),
        )
        self.operator, self.entropy, self.gates, self.meta_gate = {}, {}, {}, None
        return trace


def _bounds_of(layer: nn.Module) -> tuple[float, ...]:
    """Return the thresholds that a layer compares H of its rows with."""
    decides_by_entropy = isinstance(layer, RoutedLayer) and layer.router.kind == "threshold"
    return layer.router.thresholds() if decides_by_entropy else ()  # type: ignore[union-attr,operator]
