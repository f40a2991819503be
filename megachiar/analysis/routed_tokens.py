"""Collect the routes, entropies and losses of the tokens of many sequences, a few sequences at a time.

Shapes: R = routed layers, S = sequences, T = tokens of a sequence, N = S * T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megachiar.analysis.resampling import Clusters
from megachiar.analysis.route_trace import record_routes
from megachiar.analysis.windows import Windows
from megachiar.model import ChiarFormer


@dataclass(frozen=True)
class RoutedTokens:
    """The tokens of a text and what the routers of a model did with them.

    Attributes:
        layers: indices of the R routed layers, from 0.
        operators: names of the operators, which ``operator`` counts.
        operator: (R, S, T) int8, the operator of each token; of a soft router that of its largest gate.
        entropy: (R, S, T) fp64, spectral entropy H.
        losses: (S, T) fp64, cross-entropy of the next token in nats; nan where there is no target.
        ids: (S, T) int64, token ids.
    """

    layers: tuple[int, ...]
    operators: tuple[str, ...]
    operator: np.ndarray
    entropy: np.ndarray
    losses: np.ndarray
    ids: np.ndarray

    @property
    def attends(self) -> np.ndarray:
        """(R, S, T) bool, whether a token takes attention."""
        return self.operator == self.operators.index("attention")

    @property
    def positions(self) -> np.ndarray:
        """(S, T) int64, the position of each token in its sequence."""
        return np.broadcast_to(np.arange(self.ids.shape[1]), self.ids.shape)

    @property
    def clusters(self) -> Clusters:
        """Sequence and id of the N tokens."""
        sequence = np.broadcast_to(np.arange(len(self.ids))[:, None], self.ids.shape)
        return Clusters(sequence=sequence.ravel(), token=self.ids.ravel())


def collect_routes(
    model: ChiarFormer,
    windows: Windows,
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> RoutedTokens:
    """Run ``model`` over sequences and keep what its routers did.

    Args:
        model: in evaluation mode.
        windows: S windows of T tokens.
        batch_size: sequences of a forward pass.
        advance: is told of sequences that have been run.
    """
    operator, entropy, losses = [], [], []
    layers, operators = tuple(model.config.routed_layers), model.config.router.operators
    for batch in batches(model, windows, batch_size):
        with torch.inference_mode(), record_routes(model) as passes:
            model(*batch)
        trace, wanted = passes[0], batch[1].cpu()
        assert trace.token_losses is not None, "there are targets"
        operator.append(trace.operator[list(layers)].to(torch.int8).cpu().numpy())
        entropy.append(trace.entropy[list(layers)].double().cpu().numpy())
        losses.append(trace.token_losses.double().cpu().masked_fill(wanted < 0, torch.nan).numpy())
        advance(len(wanted))
    return RoutedTokens(
        layers=layers,
        operators=operators,
        operator=np.concatenate(operator, 1),
        entropy=np.concatenate(entropy, 1),
        losses=np.concatenate(losses),
        ids=windows.inputs,
    )


def batches(model: ChiarFormer, windows: Windows, size: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield inputs, targets and numbers of at most ``size`` windows at a time, on the device of ``model``."""
    device = next(model.parameters()).device
    for start in range(0, len(windows.inputs), size):
        yield tuple(torch.from_numpy(part[start : start + size]).to(device) for part in windows)
