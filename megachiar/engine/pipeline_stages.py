"""The parts of the model that a pipeline distributes over its stages, described as DeepSpeed asks for them.

    StageEmbedding | StagePart (layers) | StagePart | ... | StageNorm | StageEmbedding (the tied head)

Shapes: B sequences of T tokens, m rows of this rank, d channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.model.batch_layout import BatchLayout, lay_out
from megachiar.model.embedding import TiedEmbedding
from megachiar.model.init import initialise
from megachiar.model.layer_stack import build_layer, run_layers, statistics, total_regulariser
from megachiar.model.norm import RowNorm
from megachiar.planning.partition import layer_groups
from megachiar.topology import TensorParallelGroup


class StageInputs(NamedTuple):
    """The input of each part of a pipeline after the first; DeepSpeed sends it between stages as a plain tuple.

    Attributes:
        hidden_states: (m, d), the rows of this rank.
        sequence_ids: (B,) int64, the sample ids; or (B, 1 + T), each sample id followed by the tokens, where each stage
            has to know its documents.
    """

    hidden_states: torch.Tensor
    sequence_ids: torch.Tensor


class StagePart(nn.Module):
    """Consecutive layers as one part of a pipeline, which maps ``StageInputs`` to ``StageInputs``.

    The statistics of the layers do not travel to the next stage: they are kept here until ``take_report``. The value of
    a regulariser is kept too, and its gradient starts here.

    Args:
        config: config of the model.
        seed: seed of the run, for the initial weights and dropout.
        indices: numbers of the layers, from 0.
        group: the ranks that share each layer.
        interval: number of layers whose activations are recomputed together; None to keep all activations.
        length: tokens of a sequence, T.
        document_end: token that ends a document, if no token is to see another document.

    Attributes:
        regulariser_scale: factor that the gradient of the loss has been scaled by, which the regulariser's needs too.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        indices: Sequence[int],
        group: TensorParallelGroup,
        interval: int | None,
        length: int,
        document_end: int | None,
    ):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleDict({str(index): build_layer(config, index, group) for index in indices})
        self.seed = seed
        self.group = group
        self.interval = interval
        self.length = length
        self.document_end = document_end
        self.regulariser_scale = 1.0
        self._reports: list[tuple[torch.Tensor, torch.Tensor]] = []
        initialise(self, config, seed, group)

    def forward(self, inputs: StageInputs) -> StageInputs:
        """Run the layers of this part; in training, keep their reports and attach the regulariser."""
        x, sequence_ids = inputs
        has_tokens = sequence_ids.dim() > 1
        layout = lay_out(
            self.config,
            sequence_ids[:, 0] if has_tokens else sequence_ids,
            self.length,
            tokens=sequence_ids[:, 1:] if has_tokens else None,
            document_end=self.document_end,
            dropout_seed=self.seed if self.training else None,
            group=self.group,
        )
        x, outputs = run_layers(list(self.layers.values()), x, layout, None, self.interval)
        if self.training:
            regulariser = total_regulariser(outputs, x.device)
            if any(output.regulariser is not None for output in outputs):
                x = _AttachLoss.apply(x, regulariser, self.regulariser_scale)
            self._reports.append((regulariser.detach(), torch.stack(statistics(outputs))))
        return StageInputs(x, sequence_ids)

    def take_report(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean over the micro-batches since the last call of what the layers reported.

        Returns:
            The regulariser () and the statistics (4, layers of this part), in the order of ``RoutingStatistics``.
        """
        regularisers, reports = zip(*self._reports, strict=True)
        self._reports.clear()
        return torch.stack(regularisers).mean(0), torch.stack(reports).mean(0)


class _AttachLoss(torch.autograd.Function):
    """Returns ``x`` unchanged and attaches ``loss`` to it, which gets the gradient ``scale`` in the backward pass."""

    @staticmethod
    def forward(ctx, x, loss, scale):
        ctx.scale = scale
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, gradient.new_full((), ctx.scale, dtype=ctx.dtype), None


class StageNorm(nn.Module):
    """The last norm as a part of a pipeline, which maps ``StageInputs`` to hidden states (m, d)."""

    def __init__(self, config: ModelConfig, group: TensorParallelGroup):
        super().__init__()
        self.norm = RowNorm(config.hidden_size, config.norm_epsilon, group)

    def forward(self, inputs: StageInputs) -> torch.Tensor:
        hidden_states, _ = inputs
        return self.norm(hidden_states)


class StageEmbedding(TiedEmbedding):
    """The tied weight, on the first and on the last stage; neither copy holds anything else that is trained."""

    def __init__(self, config: ModelConfig, seed: int, group: TensorParallelGroup, document_end: int | None = None):
        super().__init__(config, group)
        self.seed = seed
        self.document_end = document_end
        initialise(self, config, seed, group, prefix="embedding")

    def first_part(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> StageInputs:
        """Embed tokens (B, T) with sample ids (B,) into the inputs of the first ``StagePart``."""
        tokens, sample_ids = inputs
        sequences, length = tokens.shape
        layout = BatchLayout(sequences=sequences, length=length, group=self.group)
        if self.training:
            layout = layout.with_dropout_keys(self.seed, sample_ids)
        hidden_states = self(tokens.flatten(), layout=layout)
        if self.document_end is None:
            return StageInputs(hidden_states, sample_ids)
        return StageInputs(hidden_states, torch.cat([sample_ids[:, None], tokens], 1))

    def last_part(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states (m, d), and the weight for the loss.

        The weight is an output of the part because DeepSpeed's bf16 optimizer clears gradients when the first gradient
        reaches an output: a gradient that the loss gave to the weight directly would be lost.
        """
        return hidden_states, self.weight.view_as(self.weight)


def pipeline_parts(
    config: ModelConfig,
    seed: int,
    group: TensorParallelGroup,
    interval: int | None,
    length: int,
    document_end: int | None = None,
) -> list:
    """Return DeepSpeed's specifications of all parts; each stage builds the parts that it runs.

    Args:
        config: config of the model.
        seed: seed of the run.
        group: the ranks that share each layer.
        interval: number of layers whose activations are recomputed together; None to keep all activations.
        length: tokens of a sequence, T.
        document_end: token id after which attention starts a new document; None where attention crosses documents.
    """

    def embedding(forward: Callable) -> TiedLayerSpec:
        return TiedLayerSpec(
            "embedding",
            StageEmbedding,
            config=config,
            seed=seed,
            group=group,
            document_end=document_end,
            forward_fn=forward,
            tied_weight_attr="weight",
        )

    layers = [
        LayerSpec(
            StagePart,
            config=config,
            seed=seed,
            indices=indices,
            group=group,
            interval=interval,
            length=length,
            document_end=document_end,
        )
        for indices in layer_groups(config, interval)
    ]
    norm = LayerSpec(StageNorm, config=config, group=group)
    return [embedding(StageEmbedding.first_part), *layers, norm, embedding(StageEmbedding.last_part)]
