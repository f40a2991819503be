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
from megachiar.kernels.hash import GOLDEN, mix64, uniform_hash, wrap64
from megachiar.kernels.partition import on_device
from megachiar.kernels.spectral import entropy_of_rows, spectral_entropy, spectrum_and_entropy, white_noise_entropy
from megachiar.kernels.tables import cached_table
from megachiar.model.batch_layout import BatchLayout
from megachiar.model.learned_router import ValueHead
from megachiar.model.running_number import RunningNumber
from megachiar.parallel.collectives import reduce_from_tp_group
from megachiar.parallel.linear import ReplicatedLinear
from megachiar.topology import TensorParallelGroup

LAYER, CHANNEL, EXPLORE = 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7, 0xABC98388FB8FAC03
"""Odd factors of layers, permutations and explored tokens in the hashes below, unlike those of dropout."""
BELOW_ALL = 6.0
"""How far below its usual start a threshold starts that lets all tokens pass, in units of the scores."""


@dataclass(frozen=True)
class RoutingDecision:
    """The decision of a router about this rank's rows.

    Attributes:
        operator: (m,) int64, index of the operator that each row takes; None where a partition compares the scores.
        entropy: (m,) spectral entropy H of the rows themselves, without gradient, whatever the router decides by.
        score: (m,) the number that the bounds divide, without gradient: H (threshold), H of the permuted rows (hashed),
            a uniform random number (random), the scaled prediction (learned); None where gates decide.
        spectrum: (m, P) packed DCT of the rows, without gradient, where DCT mixing can use it; else None.
        gates: (m, O) softmax weights of soft and hard routers, with gradient; else None.
        utilisation: (O,) mean use of each operator with a gradient, for the collapse regulariser; None without it.
        prediction: (m,) predicted value of attention with a gradient (learned); else None.
        explored: (m,) bool, the rows whose value is to be measured; None where nothing is learned from this pass.
    """

    operator: torch.Tensor | None
    entropy: torch.Tensor
    score: torch.Tensor | None
    spectrum: torch.Tensor | None
    gates: torch.Tensor | None
    utilisation: torch.Tensor | None
    prediction: torch.Tensor | None = None
    explored: torch.Tensor | None = None


class Router(nn.Module):
    """A router that decides by spectral entropy (threshold), by a gate (soft, hard), by a prediction of what attention
    is worth (learned), or blindly, as a control.

    The controls: a random router throws a coin for each token. A hashed router decides by H as a threshold router does,
    but of rows whose channels are in another order. Equal rows then take one route, as they do by H.

    Attributes:
        running_threshold: the threshold that holds ``router.target_share``, or that a random router's share falls by;
            None where thresholds are fixed.
        threshold_unit: scale of the scores, in which the running threshold moves.
        annealed_steps: steps that the running threshold has followed; None without ``router.anneal_steps``.
        value_head: predicts what attention is worth (learned); else None.
    """

    def __init__(self, config: ModelConfig, layer: int, group: TensorParallelGroup):
        super().__init__()
        router = config.router
        self.group = group
        self.kind = router.kind
        self.hard_gradient = router.hard_gradient
        self.operators = router.operators
        self.layer = layer
        self.config = config
        self.route_key = wrap64((layer + 1) * LAYER)
        self.dc_weight = config.dct.entropy_dc_weight
        self.epsilon = config.dct.entropy_epsilon
        self.regularised = router.collapse_weight > 0
        self.temperature = router.collapse_temperature
        self.has_thresholds = router.has_thresholds
        self.bounds = self._bounds(config, layer)
        self.explore = router.explore
        self.explore_key = wrap64((layer + 1) * EXPLORE)
        self.value_head = ValueHead(config.hidden_size, group) if self.kind == "learned" else None
        self.running_threshold: RunningNumber | None = None
        self.threshold_unit = 1.0
        self.annealed_steps = RunningNumber(0.0) if router.anneal_steps else None
        if router.target_share is not None:
            self._hold_share(config, layer)
        elif self.annealed_steps is not None:  # a coin that always falls on attention at first
            self.running_threshold = RunningNumber(-1.0)
        if self.kind in ("soft", "hard"):
            self.gate = ReplicatedLinear(config.hidden_size + 1, len(self.operators), group)

    @staticmethod
    def _bounds(config: ModelConfig, layer: int) -> tuple[float, ...]:
        """Return the increasing bounds between the operators, which ``RoutingDecision.score`` is compared with."""
        router = config.router
        three = len(router.operators) == 3
        if router.target_share is not None:
            return ()
        if router.has_thresholds:
            return tuple(config.threshold(n, layer) for n in (("tau_low", "tau_high") if three else ("tau",)))
        if router.kind == "random":
            assert router.attention_share is not None, "the config checks that random routers have shares"
            below = 1 - router.attention_share
            if not three:
                return (below,)
            assert router.rbf_share is not None
            return below - router.rbf_share, below
        return ()

    def _hold_share(self, config: ModelConfig, layer: int) -> None:
        """Make the running threshold, which starts at tau or, without one, at H of white noise or at 0."""
        start = 0.0
        if self.kind != "learned":
            start, self.threshold_unit = white_noise_entropy(config.hidden_size)
            if config.router.tau is not None:
                start = config.threshold("tau", layer)
        if self.annealed_steps is not None:
            start -= BELOW_ALL * self.threshold_unit
        self.running_threshold = RunningNumber(start)

    def thresholds(self) -> tuple[float, ...]:
        """Return the increasing numbers that ``RoutingDecision.score`` is compared with now."""
        return self.bounds if self.running_threshold is None else (self.running_threshold.value.item(),)

    def set_thresholds(self, bounds: tuple[float, ...]) -> None:
        """Compare the score with other numbers from now on."""
        if self.running_threshold is None:
            self.bounds = bounds
        else:
            self.running_threshold.value.fill_(bounds[0])

    def forward(self, x: torch.Tensor, layout: BatchLayout, scores_alone: bool = False) -> RoutingDecision:
        """Decide about this rank's rows ``x`` (m, d).

        Args:
            x: hidden states (m, d).
            layout: the layout of the micro-batch.
            scores_alone: whether a partition compares the scores with ``threshold_of``, of two operators.
        """
        spectrum, entropy = self._spectrum_and_entropy(x, scores_alone)
        operator: torch.Tensor | None
        score = gates = utilisation = prediction = explored = None
        if self.kind in ("soft", "hard"):
            feature = self._differentiable_entropy(x)[:, None].to(x.dtype)
            gates = F.softmax(self.gate(torch.cat([x, feature], -1)).to(entropy.dtype), -1)
            operator = gates.argmax(-1)
            utilisation = layout.mean_of_rows(gates) if self.regularised else None
        elif self.value_head is not None:
            prediction, score = self.value_head(x, entropy)
            operator = self._by_thresholds(score)
            if prediction.requires_grad and layout.route_keys is not None:
                explored = uniform_hash(layout.route_keys + self.explore_key) < self.explore
                if layout.row_weights is not None:  # padding has nothing to tell
                    explored = explored & (layout.row_weights[:, 0] > 0)
        else:
            score = self._score(x, entropy, layout, scores_alone)
            operator = None if scores_alone else self._by_thresholds(score)
            if self.regularised:
                seen = seen_channels(self.config, self.layer, x)
                utilisation = self._soft_thresholds(self._differentiable_entropy(seen), layout)
        if utilisation is not None and self.group.shards_rows:  # every rank adds the same regulariser to its loss
            utilisation = reduce_from_tp_group(utilisation, self.group) / self.group.size
        return RoutingDecision(
            operator=operator,
            entropy=entropy,
            score=score,
            spectrum=spectrum,
            gates=gates,
            utilisation=utilisation,
            prediction=prediction,
            explored=explored,
        )

    def _spectrum_and_entropy(self, x: torch.Tensor, entropy_alone: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return spectrum and entropy of rows (m, d), or None and the entropy alone."""
        if entropy_alone:
            return None, entropy_of_rows(x.detach(), self.dc_weight, self.epsilon)
        return spectrum_and_entropy(x, self.dc_weight, self.epsilon)

    def _score(self, x: torch.Tensor, entropy: torch.Tensor, layout: BatchLayout, entropy_alone: bool) -> torch.Tensor:
        """Return the numbers (m,) that the bounds divide; ``entropy`` (m,) is H of the rows ``x`` (m, d)."""
        if self.kind == "random":
            assert layout.route_keys is not None, "lay_out gives a random router its keys"
            return uniform_hash(layout.route_keys + self.route_key)
        if self.kind == "hashed":
            seen = seen_channels(self.config, self.layer, x)
            return self._spectrum_and_entropy(seen, entropy_alone)[1]
        return entropy

    def _by_thresholds(self, value: torch.Tensor) -> torch.Tensor:
        """Return operator 0 up to the first bound, and the last operator above the last bound.

        A value at a bound takes the cheaper operator. A bound of 0 holds no value back, and one of 1 lets none pass:
        ``tau: 0`` is attention for every row, a constant one (H = 0) included.
        """
        if self.running_threshold is not None:
            return (value > self.running_threshold.value).long()
        operator = torch.zeros_like(value, dtype=torch.int64)
        for bound in self.bounds:
            if bound <= 0:
                operator += 1
            elif bound < 1:
                operator += value > bound
        return operator

    def threshold_of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the threshold (1,) between two operators on the device, in the type that the scores of ``x`` have.

        Scores from 0 to 1 that are compared with it fall as in ``_by_thresholds``.
        """
        if self.running_threshold is not None:
            return self.running_threshold.value
        (bound,) = self.bounds
        limit = -torch.inf if bound <= 0 else torch.inf if bound >= 1 else bound
        is_double = self.kind == "random" or x.dtype == torch.float64
        return on_device(limit, x.device, torch.float64 if is_double else torch.float32)

    def _differentiable_entropy(self, x: torch.Tensor) -> torch.Tensor:
        return spectral_entropy(x, self.dc_weight, self.epsilon)

    def _soft_thresholds(self, entropy: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Return the mean use (O,) of the operators, with sigmoids of width ``collapse_temperature`` as thresholds."""
        above = [layout.mean_of_rows(torch.sigmoid((entropy - bound) / self.temperature)) for bound in self.bounds]
        edges = [torch.ones_like(above[0]), *above, torch.zeros_like(above[0])]
        return torch.stack([a - b for a, b in pairwise(edges)]).clamp_min(0)


def seen_channels(config: ModelConfig, layer: int, x: torch.Tensor) -> torch.Tensor:
    """Return the rows (n, d) whose H the router of ``layer`` compares with thresholds, of hidden states ``x`` (n, d).

    To a hashed router the channels come in an order of the layer's own; to others as they are.
    """
    if config.router.kind != "hashed":
        return x
    orders = channel_permutations(config.router.seed, config.num_layers, x.shape[1], x.device)
    return x.index_select(1, orders[layer])


@cached_table
def channel_permutations(seed: int, layers: int, d: int, device: torch.device) -> torch.Tensor:
    """Return a permutation of ``d`` channels for each of so many layers, (layers, d) int64: functions of the seed."""
    numbers = mix64(torch.arange(layers, device=device) * wrap64(LAYER) + wrap64((seed + 1) * GOLDEN))
    return mix64(numbers[:, None] + torch.arange(d, device=device) * wrap64(CHANNEL)).argsort(1)


def collapse_regulariser(utilisation: torch.Tensor, weight: float) -> torch.Tensor:
    """Return ``-weight * U`` with ``U = -sum q log q`` over the mean use ``q`` (O,) of the operators.

    It is least where all operators are used alike. The gradient is finite where an operator is not used at all.
    """
    used = utilisation.clamp_min(torch.finfo(utilisation.dtype).tiny)
    return weight * (used * used.log()).sum()
