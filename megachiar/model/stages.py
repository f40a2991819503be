"""The stack as one list of parts, in the order a token passes them.

    embedding | layers.0 | layers.1 | ... | layers.L-1 | norm | embedding (the tied head)

One rank (or tensor group) runs the whole list as ``ChiarFormer``; a pipeline gives each stage a piece of it. The parts
and the names of their parameters are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megachiar.config.model import ModelConfig
from megachiar.model.cache import DecodingCache
from megachiar.model.embedding import TiedEmbedding
from megachiar.model.flops import forward_flops_per_token, layer_flops_per_token
from megachiar.model.grid import Grid, document_starts
from megachiar.model.init import initialise
from megachiar.model.layer import FixedLayer, LayerOutput, RoutedLayer, Routes
from megachiar.model.norm import RowNorm
from megachiar.topology import TensorGroup


class RoutingStatistics(NamedTuple):
    """What the routers did in a forward pass: each (layers,) fp32, of this rank's rows, without gradient.

    Attributes:
        attention_share, rbf_share: share of tokens that took the operator.
        entropy: mean spectral entropy H; nan where a layer does not route.
        gate: mean g of the MetaRouter; nan where a layer has none.
    """

    attention_share: torch.Tensor
    rbf_share: torch.Tensor
    entropy: torch.Tensor
    gate: torch.Tensor


def build_layer(config: ModelConfig, index: int, group: TensorGroup) -> nn.Module:
    """chiar: DCT only, routed ..., attention only. baseline: attention in every layer."""
    if index in config.routed_layers:
        return RoutedLayer(config, index, group)
    is_first_of_chiar = config.kind == "chiar" and index == 0
    return FixedLayer(config, index, "dct" if is_first_of_chiar else "attention", group)


def run_layers(
    layers: Sequence[nn.Module], x: torch.Tensor, grid: Grid, cache: DecodingCache | None, interval: int | None
) -> tuple[torch.Tensor, list[LayerOutput]]:
    """Rows after ``layers``, and what each reported.

    With ``interval``, of each so many layers only the input is kept, and the rest is computed once more in the backward
    pass: with the routes that were taken, and with the same dropout, since that is keyed.
    """
    if interval is None or not torch.is_grad_enabled():
        return _run(layers, x, grid, cache, None)
    outputs: list[LayerOutput] = []
    for start in range(0, len(layers), interval):
        part, routes = layers[start : start + interval], Routes()
        x, reported = checkpoint(_run, part, x, grid, cache, routes, use_reentrant=False, preserve_rng_state=False)
        outputs += reported
    return x, outputs


def _run(
    layers: Sequence[nn.Module], x: torch.Tensor, grid: Grid, cache: DecodingCache | None, routes: Routes | None
) -> tuple[torch.Tensor, list[LayerOutput]]:
    outputs = []
    for layer in layers:
        output = layer(x, grid, cache, routes)
        x = output.rows
        outputs.append(output._replace(rows=None))
    return x, outputs


class StagePart(nn.Module):
    """Consecutive layers as one part of a pipeline: ``(rows (m, d), told)`` in and out.

    ``told`` are the sample numbers (B,), or (B, 1 + T) with where each token's document begins after them.

    What layers report does not travel to the next stage: it is kept here until ``take_report``. A regulariser's value
    is kept too, and its gradient starts here: ``regulariser_scale`` is what the loss's gradient has been scaled by.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        indices: Sequence[int],
        group: TensorGroup,
        interval: int | None,
        length: int,
    ):
        super().__init__()
        self.layers = nn.ModuleDict({str(index): build_layer(config, index, group) for index in indices})
        self.seed, self.group, self.interval, self.length = seed, group, interval, length
        self.regulariser_scale = 1.0
        self._reports: list[tuple[torch.Tensor, torch.Tensor]] = []
        initialise(self, config, seed, group)

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, told = inputs
        grid = Grid(len(told), self.length, group=self.group, since=told[:, 1:] if told.dim() > 1 else None)
        if self.training:
            grid = grid.keyed(self.seed, told[:, 0] if told.dim() > 1 else told)
        x, outputs = run_layers(list(self.layers.values()), x, grid, None, self.interval)
        if self.training:
            added = [output.regulariser for output in outputs if output.regulariser is not None]
            regulariser = sum(added) if added else x.new_zeros((), dtype=torch.float32)
            if added:
                x = _WithLoss.apply(x, regulariser, self.regulariser_scale)
            self._reports.append((regulariser.detach(), torch.stack(statistics(outputs))))
        return x, told

    def take_report(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean regulariser () and statistics (4, layers of this part) of the micro-batches since the last call."""
        regularisers, reports = zip(*self._reports, strict=True)
        self._reports.clear()
        return torch.stack(regularisers).mean(0), torch.stack(reports).mean(0)


def statistics(outputs: Sequence[LayerOutput]) -> RoutingStatistics:
    """What layers report, layer by layer."""
    return RoutingStatistics(
        *(torch.stack([getattr(o, name) for o in outputs]).detach().float() for name in RoutingStatistics._fields)
    )


class _WithLoss(torch.autograd.Function):
    """Passes rows on; a loss hangs on them and gets ``scale`` as its gradient."""

    @staticmethod
    def forward(ctx, x, loss, scale):
        ctx.scale, ctx.dtype = scale, loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.new_full((), ctx.scale, dtype=ctx.dtype), None


class StageNorm(nn.Module):
    """The last norm as a part of a pipeline: rows and what is told in, rows out."""

    def __init__(self, config: ModelConfig, group: TensorGroup):
        super().__init__()
        self.norm = RowNorm(config.hidden_size, config.norm_epsilon, group)

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.norm(inputs[0])


class StageEmbedding(TiedEmbedding):
    """The tied weight on the first and the last stage. It holds nothing else that is trained."""

    def __init__(self, config: ModelConfig, seed: int, group: TensorGroup, document_end: int | None = None):
        super().__init__(config, group)
        self.seed, self.document_end = seed, document_end
        initialise(self, config, seed, group, prefix="embedding")

    def first_part(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, T) and sample numbers (B,) to rows (m, d) and what ``StagePart`` is told."""
        tokens, samples = inputs
        grid = Grid(*tokens.shape, group=self.group)
        if self.training:
            grid = grid.keyed(self.seed, samples)
        rows = self(tokens.flatten(), grid=grid)
        if self.document_end is None:
            return rows, samples
        return rows, torch.cat([samples[:, None], document_starts(tokens, self.document_end)], 1)

    def last_part(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, and the weight for the loss.

        It leaves through the part's outputs, as DeepSpeed's bf16 optimizer clears gradients when the first one reaches
        an output: what the loss gave to the weight directly would be lost.
        """
        return rows, self.weight.view_as(self.weight)


def pipeline_parts(
    config: ModelConfig,
    seed: int,
    group: TensorGroup,
    interval: int | None,
    length: int,
    document_end: int | None = None,
) -> list:
    """The list for a pipeline: specifications that the stage which owns a part builds."""
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    def tied(work: Callable) -> TiedLayerSpec:
        return TiedLayerSpec(
            *("embedding", StageEmbedding, config, seed, group, document_end),
            forward_fn=work,
            tied_weight_attr="weight",
        )

    groups = layer_groups(config, interval)
    layers = [LayerSpec(StagePart, config, seed, indices, group, interval, length) for indices in groups]
    first, last = tied(StageEmbedding.first_part), tied(StageEmbedding.last_part)
    return [first, *layers, LayerSpec(StageNorm, config, group), last]


def layer_groups(config: ModelConfig, interval: int | None) -> list[range]:
    """Layers that a pipeline does not part: those whose activations are recomputed together."""
    step = interval or 1
    return [range(start, min(start + step, config.num_layers)) for start in range(0, config.num_layers, step)]


def stage_bounds(config: ModelConfig, interval: int | None, length: int, share: float, stages: int) -> list[int]:
    """Parts of ``pipeline_parts`` at which stages begin, and their number: the costliest stage costs least.

    Args:
        config: of the model.
        interval: as in ``pipeline_parts``.
        length: tokens of a sequence.
        share: of a routed layer's tokens that take attention, as far as is known.
        stages: at most as many as ``layer_groups``.
    """
    bounds = _group_bounds(config, interval, length, share, stages)
    # Parts: the embedding goes with the first group, the norm and the head with the last.
    return [0, *(bound + 1 for bound in bounds[1:-1]), bounds[-1] + 3]


def stage_layers(config: ModelConfig, interval: int | None, length: int, share: float, stages: int) -> list[range]:
    """Layers of each stage; arguments as of ``stage_bounds``."""
    groups = layer_groups(config, interval)
    bounds = _group_bounds(config, interval, length, share, stages)
    return [range(groups[a].start, groups[b - 1].stop) for a, b in pairwise(bounds)]


def _group_bounds(config: ModelConfig, interval: int | None, length: int, share: float, stages: int) -> list[int]:
    """Groups of layers at which stages begin, and their number."""
    layers = [layer_flops_per_token(config, index, length, share).total for index in range(config.num_layers)]
    costs = [sum(layers[i] for i in indices) for indices in layer_groups(config, interval)]
    costs[-1] += forward_flops_per_token(config, length, share).head
    return balanced(costs, stages)


def balanced(costs: Sequence[float], stages: int) -> list[int]:
    """Bounds of ``stages`` runs of ``costs``, none empty, whose greatest sum is least; early runs take the ties."""
    sums = [0.0, *accumulate(costs)]
    best = {(0, 0): (0.0, [0])}
    for stage in range(1, stages + 1):
        for end in range(stage, len(costs) - (stages - stage) + 1):
            best[stage, end] = min(
                (max(best[stage - 1, start][0], sums[end] - sums[start]), [*best[stage - 1, start][1], end])
                for start in range(stage - 1, end)
                if (stage - 1, start) in best
            )
    return best[stages, len(costs)][1]
