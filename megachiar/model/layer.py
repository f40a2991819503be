"""A layer: an operator sub-layer that tokens are routed to, and the feed-forward sub-layer that all operators share.

A routed layer permutes its rows into operator order, lets each operator compute its own rows alone and permutes back:

    x (m, d) --router--> attention rows | rbf rows | dct rows --operators--> (m, d) --feed-forward--> (m, d)

In training a learned router has both operators computed for some of the tokens. These are dispatched to attention, take
DCT mixing too, and go on with the result of their own route.

Shapes: N = rows of the micro-batch, m = this rank's rows (N, or N / p with sequence parallelism), n = rows of one
operator, d = channels, O = operators of the layer.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.kernels.permute import permute, unpermute
from megachiar.model.attention import SelfAttention
from megachiar.model.batch_layout import BatchLayout
from megachiar.model.dct_mixing import DctMixing
from megachiar.model.dispatch import DispatchPlan, OperatorTokens, join_tokens, plan_dispatch, synchronize_routes
from megachiar.model.feed_forward import FeedForward
from megachiar.model.kv_cache import DecodingCache
from megachiar.model.learned_router import learn_values
from megachiar.model.meta_router import MetaRouter
from megachiar.model.rbf_mixing import RbfMixing
from megachiar.model.router import Router, RoutingDecision, collapse_regulariser
from megachiar.model.static_layer import PartitionStatistics, mix_statically, partition_rows
from megachiar.phases import phase
from megachiar.topology import TensorParallelGroup

Statistic = torch.Tensor | float
"""A scalar () on the device, or a number that is known without asking it."""


class LayerOutput(NamedTuple):
    """The result of a layer. Hidden states and regulariser have gradients, the rest is for the log.

    Attributes:
        hidden_states: (m, d), of this rank's rows.
        regulariser: scalar to add to the loss; None if there is none.
        attention_share, rbf_share: the share of this rank's rows that took the operator; with a soft router the
            operator's mean gate.
        entropy: mean spectral entropy H; nan where the layer does not route.
        gate: mean gate g of the MetaRouter; nan without one.
        partitioned: what a layer of static shapes measured, from which ``layer_stack.statistics`` makes the share of
            attention and the mean of H, for all such layers together; None in other layers.
    """

    hidden_states: torch.Tensor
    regulariser: torch.Tensor | None
    attention_share: Statistic = torch.nan
    rbf_share: Statistic = 0.0
    entropy: Statistic = torch.nan
    gate: Statistic = torch.nan
    partitioned: PartitionStatistics | None = None

    @classmethod
    def unmeasured(cls, hidden_states: torch.Tensor) -> LayerOutput:
        """Return the result of a pass behind a cache, which measures nothing."""
        return cls(hidden_states, None)


Routes = dict[str, torch.Tensor]
"""The routes (N,) of all rows by the name of the layer. A layer that finds its routes there takes them instead of
deciding; else it decides and writes them, so that recomputed activations take the same routes."""


class FixedLayer(nn.Module):
    """A layer whose rows all take one operator: DCT mixing (layer 1, with the MetaRouter's gate) or attention."""

    def __init__(self, config: ModelConfig, index: int, operator: str, group: TensorParallelGroup):
        super().__init__()
        self.name = f"layers.{index}"
        self.is_attention = operator == "attention"
        # Layer 1's DCT mixing has a gate.
        has_gate = not self.is_attention and config.meta_router.pool != "none"
        self.meta_router = MetaRouter(config, group) if has_gate else None
        self.operator = SelfAttention(config, index, group) if self.is_attention else DctMixing(config, group)
        self.feed_forward = FeedForward(config, index, group)

    def forward(
        self,
        x: torch.Tensor,
        layout: BatchLayout,
        cache: DecodingCache | None,
        routes: Routes | None,
        matrix: torch.Tensor | None = None,
    ) -> LayerOutput:
        """Run the layer for this rank's rows.

        Args:
            x: hidden states (m, d).
            layout: the layout of the micro-batch.
            cache: of earlier positions; None in training.
            routes: not used: all rows take one operator.
            matrix: (d, d), DCT mixing as a matrix; None where the operator makes what it needs.
        """
        if cache is not None:
            return LayerOutput.unmeasured(self._hidden_states_and_gate(x, layout, cache, matrix)[0])
        return self.compute(x, layout, matrix)

    def compute(self, x: torch.Tensor, layout: BatchLayout, matrix: torch.Tensor | None) -> LayerOutput:
        """Run the layer without a cache, which can be compiled as one graph; the arguments are those of ``forward``."""
        hidden_states, gate = self._hidden_states_and_gate(x, layout, None, matrix)
        return LayerOutput(
            hidden_states=hidden_states,
            regulariser=None,
            attention_share=float(self.is_attention),
            gate=torch.nan if gate is None else _mean_gate(gate.detach().float(), layout),
        )

    def _hidden_states_and_gate(
        self, x: torch.Tensor, layout: BatchLayout, cache: DecodingCache | None, matrix: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return hidden states (m, d), and the gate (m, 1) or (1, 1) of the MetaRouter; None without one."""
        with phase("attention" if self.is_attention else "dct"):
            if self.is_attention:
                y = self.operator(x, x, None, layout, cache and cache.layer(f"{self.name}.attention"))
            else:
                y = self.operator(x, None, matrix)
        with phase("feed-forward"):
            hidden_states = self.feed_forward(y, layout.dropout_keys)
        if self.meta_router is None:
            return hidden_states, None
        with phase("route"):
            gate = self.meta_router(x, layout, cache)
        return gate * hidden_states + (1 - gate) * x, gate


def _mean_gate(gate: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
    """Return the mean () of gates (m, 1), or (1, 1) for all rows."""
    is_by_row = layout.row_weights is not None and len(gate) == len(layout.row_weights)
    return layout.mean_of_rows(gate).squeeze() if is_by_row else gate.mean()


class RoutedLayer(nn.Module):
    """A layer whose router chooses an operator for each row.

    Attributes:
        last_routes: the routes (N,) of the last forward pass, so that ranks can compare them; None before the first.
        has_static_shapes: whether training computes its operators with shapes that do not depend on the routes (see
            ``static_layer``).
    """

    def __init__(self, config: ModelConfig, index: int, group: TensorParallelGroup):
        super().__init__()
        self.name = f"layers.{index}"
        self.names = config.router.operators
        self.collapse_weight = config.router.collapse_weight
        self.router = Router(config, index, group)
        self.attention = SelfAttention(config, index, group)
        self.dct = DctMixing(config, group)
        if "rbf" in self.names:
            self.rbf = RbfMixing(config, index, group)
        self.feed_forward = FeedForward(config, index, group)
        self.last_routes: torch.Tensor | None = None
        self.has_static_shapes = False

    def forward(
        self,
        x: torch.Tensor,
        layout: BatchLayout,
        cache: DecodingCache | None,
        routes: Routes | None,
        matrix: torch.Tensor | None = None,
    ) -> LayerOutput:
        """Run the layer for this rank's rows.

        Args:
            x: hidden states (m, d).
            layout: the layout of the micro-batch.
            cache: of earlier positions; None in training.
            routes: routes to take, or to write if this layer has none there; None to decide and write nothing.
            matrix: (d, d), DCT mixing as a matrix, for static shapes; None where the layer makes what it needs.
        """
        if self.has_static_shapes and cache is None:
            return self._with_static_shapes(x, layout, routes, matrix)
        with phase("route"):
            decision = self.router(x, layout)
        if cache is not None:
            return LayerOutput.unmeasured(self._decode(x, decision, layout, cache, routes))
        if self.router.kind == "soft":
            hidden_states = self._feed_forward(self._blend(x, decision, layout, None), layout)
            operator_fractions = layout.mean_of_rows(decision.gates.detach())
        else:
            hidden_states, operator_fractions = self._route(x, decision, layout, routes)
        share: dict[str, Statistic] = dict(zip(self.names, operator_fractions.float(), strict=True))
        return LayerOutput(
            hidden_states=hidden_states,
            regulariser=self._regulariser(decision),
            attention_share=share["attention"],
            rbf_share=share.get("rbf", 0.0),
            entropy=layout.mean_of_rows(decision.entropy.float()),
        )

    def _with_static_shapes(
        self, x: torch.Tensor, layout: BatchLayout, routes: Routes | None, matrix: torch.Tensor | None
    ) -> LayerOutput:
        """Run the layer for all rows (N, d) without waiting for the routes; the arguments are those of ``forward``."""
        taken = None if routes is None else routes.get(self.name)
        output, self.last_routes = self.compute(x, layout, self.router.threshold_of(x), taken, matrix)
        if routes is not None:
            routes[self.name] = self.last_routes
        return output

    def compute(
        self,
        x: torch.Tensor,
        layout: BatchLayout,
        threshold: torch.Tensor,
        routes: torch.Tensor | None,
        matrix: torch.Tensor | None,
    ) -> tuple[LayerOutput, torch.Tensor]:
        """Run the layer with static shapes, which can be compiled as one graph that all such layers share.

        Args:
            x: hidden states (N, d).
            layout: the layout of the micro-batch.
            threshold: (1,), what the router's scores are compared with: an argument, as each layer has its own.
            routes: (N,) int64, routes to take instead of deciding; None to decide.
            matrix: (d, d), DCT mixing as a matrix; None where the layer makes what it needs.

        Returns:
            The result of the layer, and the routes (N,) int64 that its rows took.
        """
        with phase("route"):
            decision = self.router(x, layout, scores_alone=True)
            by = partition_rows(decision, threshold, layout, routes)
        y = mix_statically(self.attention, self.dct, x, by, layout, matrix)
        output = LayerOutput(self._feed_forward(y, layout), self._regulariser(decision))
        if layout.row_weights is None:
            output = output._replace(partitioned=PartitionStatistics(by.attention_rows, decision.entropy))
        else:
            means = [layout.mean_of_rows(values.float()) for values in (by.routes, decision.entropy)]
            output = output._replace(attention_share=means[0], entropy=means[1])
        return output, by.routes

    def _regulariser(self, decision: RoutingDecision) -> torch.Tensor | None:
        """Return the regulariser against a collapse of the routes; None without it."""
        if decision.utilisation is None:
            return None
        return collapse_regulariser(decision.utilisation, self.collapse_weight)

    def _decode(
        self,
        x: torch.Tensor,
        decision: RoutingDecision,
        layout: BatchLayout,
        cache: DecodingCache,
        routes: Routes | None,
    ) -> torch.Tensor:
        """Compute hidden states (m, d) behind a cache, without gradient and without what is only for the log."""
        if self.router.kind == "soft":
            return self._feed_forward(self._blend(x, decision, layout, cache), layout)
        operator, _ = self._decided(decision, layout, routes)
        self.last_routes = operator
        plan = plan_dispatch(operator, len(self.names), layout)
        counts, is_alike = plan.local_counts, len(x) in plan.local_counts  # as the row of a single sequence is
        parts = [x[:count] for count in counts] if is_alike else permute(x, plan.permutation, counts)
        results = [
            self._operate(name, x, routed, operator_tokens, decision.spectrum, layout, cache)
            for name, routed, operator_tokens in zip(reversed(self.names), parts, plan.operators, strict=True)
        ]
        y = results[counts.index(len(x))] if is_alike else unpermute(results, plan.permutation)
        return self._feed_forward(y, layout)

    def _route(
        self, x: torch.Tensor, decision: RoutingDecision, layout: BatchLayout, routes: Routes | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both sub-layers, each row through its own operator.

        Returns:
            Hidden states (m, d), and the fraction (O,) of this rank's rows that each operator took.
        """
        with phase("route"):
            operator, explored = self._decided(decision, layout, routes)
            self.last_routes = operator
            dispatched = operator if explored is None else operator.masked_fill(explored, self.names.index("attention"))
            plan = plan_dispatch(dispatched, len(self.names), layout)
            parts = permute(x, plan.permutation, plan.local_counts)
        results = [
            self._operate(name, x, routed, operator_tokens, decision.spectrum, layout, None)
            for name, routed, operator_tokens in zip(reversed(self.names), parts, plan.operators, strict=True)
        ]
        with phase("route"):
            y = unpermute(results, plan.permutation)
        if decision.gates is not None and decision.gates.requires_grad:
            y = self._with_gradient_of_gates(y, x, operator[layout.local_slice], plan, decision, layout)
        if explored is not None:
            y = self._with_measured_values(y, x, operator[layout.local_slice], explored, decision, layout)
        counts = plan.local_counts if explored is None else None
        operator_fractions = self._fractions(operator[layout.local_slice], counts, layout)
        return self._feed_forward(y, layout), operator_fractions

    def _feed_forward(self, x: torch.Tensor, layout: BatchLayout) -> torch.Tensor:
        """Run the feed-forward sub-layer for rows (m, d)."""
        with phase("feed-forward"):
            return self.feed_forward(x, layout.dropout_keys)

    def _decided(
        self, decision: RoutingDecision, layout: BatchLayout, routes: Routes | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the routes (N,) of all rows, and which rows (N,) are explored; None where none is."""
        name = f"{self.name}.explored"
        if routes is not None and self.name in routes:
            return routes[self.name], routes.get(name)
        assert decision.operator is not None, "only a partition compares scores"
        if decision.explored is None:
            operator, explored = synchronize_routes(decision.operator, layout), None
        else:
            both = synchronize_routes(decision.operator + len(self.names) * decision.explored, layout)
            operator, explored = both % len(self.names), both >= len(self.names)
        if routes is not None:
            routes[self.name] = operator
            if explored is not None:
                routes[name] = explored
        return operator, explored

    def _fractions(self, operator: torch.Tensor, counts: list[int] | None, layout: BatchLayout) -> torch.Tensor:
        """Return the fraction (O,) of this rank's rows that each operator took.

        Args:
            operator: (m,) their routes.
            counts: how many rows took each operator, last operator first; None where they were not counted.
            layout: the layout of the micro-batch.
        """
        if layout.row_weights is not None or counts is None:
            numbers = torch.arange(len(self.names), device=operator.device)
            return layout.mean_of_rows((operator[:, None] == numbers).float())
        # Filled, not copied: a copy from the host would wait for all that the GPU has to do.
        shares = (size / len(operator) for size in reversed(counts))
        return torch.stack([torch.full((), share, dtype=torch.float32, device=operator.device) for share in shares])

    def _with_gradient_of_gates(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        operator: torch.Tensor,
        plan: DispatchPlan,
        decision: RoutingDecision,
        layout: BatchLayout,
    ) -> torch.Tensor:
        """Give the results of a hard router the straight-through gradient of its gates.

        Their values stay. The gradient is that of the sum of ``gate * result`` over the operators, in which a result
        that was not taken is a constant. Those results are computed here, for training alone.

        Args:
            y: results (m, d) of the operators that this rank's rows took.
            x: the rows (m, d).
            operator: (m,) int64, the operator that each row took.
            plan: the tokens of each operator.
            decision: has the gates (m, O).
            layout: the layout of the micro-batch.
        """
        assert decision.gates is not None, "a hard router has gates"
        change = (decision.gates - decision.gates.detach()).to(y.dtype)  # zeros
        not_taken = range(len(self.names))
        if self.router.hard_gradient == "dct_only":  # DCT's own rows are compared with nothing, and teach nothing
            not_taken = range(1)
            change = change * (operator > 0)[:, None]
        y = y * (1 + change.gather(-1, operator[:, None]))
        for index in not_taken:
            others = [tokens for o, tokens in enumerate(reversed(plan.operators)) if o != index]
            tokens = join_tokens(others)
            with torch.no_grad():
                rows = x.index_select(0, tokens.local_indices)
                result = self._operate(self.names[index], x, rows, tokens, decision.spectrum, layout, None)
            gate = change[:, index].index_select(0, tokens.local_indices)
            y = y.index_add(0, tokens.local_indices, gate[:, None] * result)
        return y

    def _with_measured_values(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        operator: torch.Tensor,
        explored: torch.Tensor,
        decision: RoutingDecision,
        layout: BatchLayout,
    ) -> torch.Tensor:
        """Give explored rows the result of their own route, and let its gradient teach the router.

        Args:
            y: results (m, d) of this rank's rows, in which explored rows have that of attention.
            x: the rows (m, d).
            operator: (m,) int64, the operator that each row takes.
            explored: (N,) bool, of all rows.
            decision: has the predictions (m,).
            layout: the layout of the micro-batch.
        """
        assert decision.prediction is not None, "a learned router predicts"
        assert self.router.value_head is not None, "a learned router has a head"
        indices = torch.nonzero(explored[layout.local_slice]).flatten()
        spectrum = decision.spectrum.index_select(0, indices) if decision.spectrum is not None else None
        mixed = self.dct(x.index_select(0, indices), spectrum)
        attended = y.index_select(0, indices)
        attends = operator.index_select(0, indices) == self.names.index("attention")
        taken = learn_values(
            self.router.value_head,
            torch.where(attends[:, None], attended, mixed),
            (attended - mixed).detach(),
            decision.prediction.index_select(0, indices),
            layout.num_rows,
        )
        return y.index_copy(0, indices, taken)

    def _blend(
        self, x: torch.Tensor, decision: RoutingDecision, layout: BatchLayout, cache: DecodingCache | None
    ) -> torch.Tensor:
        """Compute the sub-layer of a soft router: every operator for every row, weighted by the gates."""
        everything = OperatorTokens(
            indices=layout.all_indices(x.device),
            counts_per_rank=None,
            local_indices=torch.arange(len(x), device=x.device),
        )
        results = [self._operate(name, x, x, everything, decision.spectrum, layout, cache) for name in self.names]
        assert decision.gates is not None, "a soft router has gates"
        gates = decision.gates.to(x.dtype)
        weighted = (gate[:, None] * result for gate, result in zip(gates.unbind(-1), results, strict=True))
        return functools.reduce(torch.add, weighted)

    def _operate(
        self,
        name: str,
        x: torch.Tensor,
        routed: torch.Tensor,
        operator_tokens: OperatorTokens,
        spectrum: torch.Tensor | None,
        layout: BatchLayout,
        cache: DecodingCache | None,
    ) -> torch.Tensor:
        """Compute operator ``name`` for its rows. It runs even without rows: all ranks must gather and reduce alike."""
        with phase(name):
            if name == "dct":
                if cache is not None and len(routed) == 0:  # nothing is communicated, and nothing kept
                    return routed
                if spectrum is not None and len(routed) < len(spectrum):
                    spectrum = spectrum.index_select(0, operator_tokens.local_indices)
                return self.dct(routed, spectrum)
            operator = self.attention if name == "attention" else self.rbf
            return operator(x, routed, operator_tokens, layout, cache and cache.layer(f"{self.name}.{name}"))
