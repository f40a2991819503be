"""The parts of the model that a pipeline shares out among its stages, as DeepSpeed wants them described.

StageEmbedding | StagePart (layers) | StagePart | ... | StageNorm | StageEmbedding (the tied head)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.model.batch_layout import BatchLayout, find_document_starts
from megachiar.model.embedding import TiedEmbedding
from megachiar.model.init import initialise
from megachiar.model.layer_stack import build_layer, run_layers, statistics
from megachiar.model.norm import RowNorm
from megachiar.planning.partition import layer_groups
from megachiar.topology import TensorParallelGroup


class StageInputs(NamedTuple):
    """What one part of a pipeline hands to the next; DeepSpeed sends it from stage to stage as a plain tuple.

    Attributes:
        hidden_states: (m, d), of this rank's rows.
        sequence_ids: (B,) int64, the sample ids; or (B, 1 + T), with the document starts of the tokens after each.
    """

    hidden_states: torch.Tensor
    sequence_ids: torch.Tensor


class StagePart(nn.Module):
    """Consecutive layers as one part of a pipeline: ``StageInputs`` in and out.

    What layers report does not travel to the next stage: it is kept here until ``take_report``. A regulariser's value
    is kept too, and its gradient starts here: ``regulariser_scale`` is what the loss's gradient has been scaled by.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        indices: Sequence[int],
        group: TensorParallelGroup,
        interval: int | None,
        length: int,
    ):
        super().__init__()
        self.layers = nn.ModuleDict({str(index): build_layer(config, index, group) for index in indices})
        self.seed, self.group, self.interval, self.length = seed, group, interval, length
        self.regulariser_scale = 1.0
        self._reports: list[tuple[torch.Tensor, torch.Tensor]] = []
        initialise(self, config, seed, group)

    def forward(self, inputs: StageInputs) -> StageInputs:
        x, sequence_ids = inputs
        has_documents = sequence_ids.dim() > 1
        layout = BatchLayout(
            sequences=len(sequence_ids),
            length=self.length,
            group=self.group,
            document_starts=sequence_ids[:, 1:] if has_documents else None,
        )
        if self.training:
            layout = layout.with_dropout_keys(self.seed, sequence_ids[:, 0] if has_documents else sequence_ids)
        x, outputs = run_layers(list(self.layers.values()), x, layout, None, self.interval)
        if self.training:
            added = [output.regulariser for output in outputs if output.regulariser is not None]
            regulariser = sum(added) if added else x.new_zeros((), dtype=torch.float32)
            if added:
                x = _WithLoss.apply(x, regulariser, self.regulariser_scale)
            self._reports.append((regulariser.detach(), torch.stack(statistics(outputs))))
        return StageInputs(x, sequence_ids)

    def take_report(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean regulariser () and statistics (4, layers of this part) of the micro-batches since the last call."""
        regularisers, reports = zip(*self._reports, strict=True)
        self._reports.clear()
        return torch.stack(regularisers).mean(0), torch.stack(reports).mean(0)


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
    """The last norm as a part of a pipeline: ``StageInputs`` in, hidden states (m, d) out."""

    def __init__(self, config: ModelConfig, group: TensorParallelGroup):
        super().__init__()
        self.norm = RowNorm(config.hidden_size, config.norm_epsilon, group)

    def forward(self, inputs: StageInputs) -> torch.Tensor:
        hidden_states, _ = inputs
        return self.norm(hidden_states)


class StageEmbedding(TiedEmbedding):
    """The tied weight on the first and the last stage. It holds nothing else that is trained."""

    def __init__(self, config: ModelConfig, seed: int, group: TensorParallelGroup, document_end: int | None = None):
        super().__init__(config, group)
        self.seed, self.document_end = seed, document_end
        initialise(self, config, seed, group, prefix="embedding")

    def first_part(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> StageInputs:
        """Embed tokens (B, T) with sample ids (B,) into the inputs of the first ``StagePart``."""
        tokens, sample_ids = inputs
        layout = BatchLayout(*tokens.shape, group=self.group)
        if self.training:
            layout = layout.with_dropout_keys(self.seed, sample_ids)
        hidden_states = self(tokens.flatten(), layout=layout)
        if self.document_end is None:
            return StageInputs(hidden_states, sample_ids)
        starts = find_document_starts(tokens, self.document_end)
        return StageInputs(hidden_states, torch.cat([sample_ids[:, None], starts], 1))

    def last_part(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows, and the weight for the loss.

        It leaves through the part's outputs, as DeepSpeed's bf16 optimizer clears gradients when the first one reaches
        an output: what the loss gave to the weight directly would be lost.
        """
        return rows, self.weight.view_as(self.weight)


def pipeline_parts(
    config: ModelConfig,
    seed: int,
    group: TensorParallelGroup,
    interval: int | None,
    length: int,
    document_end: int | None = None,
) -> list:
    """The list for a pipeline: specifications that the stage which owns a part builds."""

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
