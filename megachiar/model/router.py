"""The router of a layer: it decides which operator each row takes.

Shapes: m = this rank's rows, d = channels, P = numbers of a packed spectrum, O = operators of the layer in the config's
order, by rising entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.hash import uniform_hash
from megachiar.kernels.spectral import spectral_entropy, spectrum_and_entropy
from megachiar.model.batch_layout import BatchLayout
from megachiar.parallel.collectives import reduce_from_tp_group
from megachiar.parallel.linear import ReplicatedLinear
from megachiar.topology import TensorParallelGroup


@dataclass(frozen=True)
class RoutingDecision:
    """The decision of a router about this rank's rows.

    Attributes:
        operator: (m,) int64, index of the operator that each row takes.
        entropy: (m,) spectral entropy H, without gradient.
        spectrum: (m, P) packed DCT of the rows, without gradient, where DCT mixing can use it; else None.
        gates: (m, O) softmax weights of soft and hard routers, with gradient; else None.
        utilisation: (O,) mean use of each operator with a gradient, for the collapse regulariser; None without it.
    """

    operator: torch.Tensor
    entropy: torch.Tensor
    spectrum: torch.Tensor | None
    gates: torch.Tensor | None
    utilisation: torch.Tensor | None


class Router(nn.Module):
    """A router that decides by spectral entropy (threshold), by a learned gate (soft, hard), or by a hash (random)."""

    def __init__(self, config: ModelConfig, layer: int, group: TensorParallelGroup):
        super().__init__()
        router = config.router
        self.group = group
        self.kind = router.kind
        self.hard_gradient = router.hard_gradient
        self.operators = router.operators
        self.layer = layer
        self.seed = router.seed
        self.dc_weight = config.dct.entropy_dc_weight
        self.epsilon = config.dct.entropy_epsilon
        self.regularised = router.collapse_weight > 0
        self.temperature = router.collapse_temperature
        self.bounds = self._bounds(config, layer)
        if self.kind in ("soft", "hard"):
            self.gate = ReplicatedLinear(config.hidden_size + 1, len(self.operators), group)

    @staticmethod
    def _bounds(config: ModelConfig, layer: int) -> tuple[float, ...]:
        """Return the increasing bounds between the operators: on H (threshold) or on a uniform hash (random)."""
        router = config.router
        three = len(router.operators) == 3
        if router.kind == "threshold":
            return tuple(config.threshold(n, layer) for n in (("tau_low", "tau_high") if three else ("tau",)))
        if router.kind == "random":
            assert router.attention_share is not None, "the config checks that random routers have shares"
            below = 1 - router.attention_share
            if not three:
                return (below,)
            assert router.rbf_share is not None
            return below - router.rbf_share, below
        return ()

    def forward(self, x: torch.Tensor, layout: BatchLayout) -> RoutingDecision:
        """Decide about this rank's rows ``x`` (m, d)."""
        spectrum, entropy = spectrum_and_entropy(x, self.dc_weight, self.epsilon)
        gates = utilisation = None
        if self.kind == "threshold":
            operator = self._by_bounds(entropy)
            if self.regularised:
                utilisation = self._soft_thresholds(self._differentiable_entropy(x), layout)
        elif self.kind == "random":
            operator = self._by_bounds(self._hash(layout, x.device))
        else:
            feature = self._differentiable_entropy(x)[:, None].to(x.dtype)
            gates = F.softmax(self.gate(torch.cat([x, feature], -1)).to(entropy.dtype), -1)
            operator = gates.argmax(-1)
            utilisation = layout.mean_of_rows(gates) if self.regularised else None
        if utilisation is not None and self.group.shards_rows:  # every rank adds the same regulariser to its loss
            utilisation = reduce_from_tp_group(utilisation, self.group) / self.group.size
        return RoutingDecision(
            operator=operator,
            entropy=entropy,
            spectrum=spectrum,
            gates=gates,
            utilisation=utilisation,
        )

    def _by_bounds(self, value: torch.Tensor) -> torch.Tensor:
        """Return operator 0 up to the first bound, and the last operator above the last bound.

        A value at a bound takes the cheaper operator.
        """
        first, *others = self.bounds
        operator = (value > first).long()
        for bound in others:
            operator += value > bound
        return operator

    def _differentiable_entropy(self, x: torch.Tensor) -> torch.Tensor:
        return spectral_entropy(x, self.dc_weight, self.epsilon)

    def _soft_thresholds(self, entropy: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Return the mean use (O,) of the operators, with sigmoids of width ``collapse_temperature`` as thresholds."""
        above = [layout.mean_of_rows(torch.sigmoid((entropy - bound) / self.temperature)) for bound in self.bounds]
        edges = [torch.ones_like(above[0]), *above, torch.zeros_like(above[0])]
        return torch.stack([a - b for a, b in pairwise(edges)]).clamp_min(0)

    def _hash(self, layout: BatchLayout, device: torch.device) -> torch.Tensor:
        """Return a fp64 number in [0, 1) for each of this rank's rows: a function of seed, layer and position alone."""
        key = (self.seed * 1_000_003 + self.layer) * 0x9E3779B97F4A7C15 % 2**62
        return uniform_hash(layout.local_positions(device) + key)


def collapse_regulariser(utilisation: torch.Tensor, weight: float) -> torch.Tensor:
    """Return ``-weight * U`` with ``U = -sum q log q`` over the mean use ``q`` (O,) of the operators.

    It is least where all operators are used alike. The gradient is finite where an operator is not used at all.
    """
    used = utilisation.clamp_min(torch.finfo(utilisation.dtype).tiny)
    return weight * (used * used.log()).sum()
