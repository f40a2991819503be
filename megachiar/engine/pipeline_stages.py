"""The parts of the model that a pipeline distributes over its stages, described as DeepSpeed asks for them.

    StageEmbedding | StagePart (layers) | StagePart | ... | StageNorm | StageEmbedding (the tied head)

Every part runs the micro-batches of a step in one order. What each is for, the parts read from ``MicroBatchQueue``s. In
a run whose main task is a classification no head is tied: the first part is ``UntiedEmbedding``, and ``StageNorm``'s
logits are the output of the last stage.

Shapes: B sequences of T tokens, m rows of this rank, d channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from deepspeed.pipe import LayerSpec, TiedLayerSpec
from torch import nn

from megachiar.config.model import ModelConfig
from megachiar.config.tasks import HeadConfig, RunTask
from megachiar.engine.micro_batches import MicroStep
from megachiar.model.batch_layout import BatchLayout, lay_out
from megachiar.model.classifier import build_heads, pool, real_lengths, touch_unused
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
        sequence_ids: (B, 2) int64, the sample ids and the lengths of the sequences without padding; or (B, 2 + T),
            followed by the tokens, where each stage has to know its documents.
    """

    hidden_states: torch.Tensor
    sequence_ids: torch.Tensor


class MicroBatchQueue:
    """The tasks of the micro-batches that a part of the pipeline is about to run, in their order.

    Args:
        tasks: of the run.
    """

    def __init__(self, tasks: Sequence[RunTask]):
        self._tasks = tasks
        self._waiting: deque[MicroStep] = deque()

    def fill(self, plan: Iterable[MicroStep]) -> None:
        """Set the micro-batches of the next step."""
        self._waiting = deque(plan)

    def take(self) -> tuple[MicroStep, RunTask]:
        """Return the next micro-batch and its task."""
        step = self._waiting.popleft()
        return step, self._tasks[step.task]


def _real_lengths(sequence_ids: torch.Tensor, task: RunTask) -> torch.Tensor | None:
    """Return how many tokens (B,) of each sequence are no padding; None where all are."""
    is_masked = task.head is not None and task.head.padding == "masked"
    return sequence_ids[:, 1] if is_masked else None


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
        tasks: of the run.
        document_end: token that ends a document, if no token is to see another document.

    Attributes:
        queue: the micro-batches that come next.
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
        tasks: Sequence[RunTask],
        document_end: int | None,
    ):
        super().__init__()
        self.config = config
        self.document_end = document_end
        self.queue = MicroBatchQueue(tasks)
        self.layers = nn.ModuleDict({str(index): build_layer(config, index, group) for index in indices})
        self.seed = seed
        self.group = group
        self.interval = interval
        self.length = length
        self.regulariser_scale = 1.0
        self._reports: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._gates: list[list[torch.Tensor]] = [[] for _ in tasks[1:]]
        initialise(self, config, seed, group)

    def forward(self, inputs: StageInputs) -> StageInputs:
        """Run the layers of this part; in training, keep their reports and attach the regulariser."""
        x, sequence_ids = inputs
        micro_step, task = self.queue.take()
        layout = lay_out(
            self.config,
            sequence_ids[:, 0],
            self.length,
            tokens=sequence_ids[:, 2:],
            document_end=self.document_end if task.head is None else None,
            dropout_seed=self.seed if self.training else None,
            group=self.group,
            lengths=_real_lengths(sequence_ids, task),
        )
        x, outputs = run_layers(list(self.layers.values()), x, layout, None, self.interval)
        if self.training and micro_step.task == 0:
            regulariser = total_regulariser(outputs, x.device)
            if any(output.regulariser is not None for output in outputs):
                x = _AttachLoss.apply(x, regulariser, self.regulariser_scale)
            self._reports.append((regulariser.detach(), statistics(outputs, layout, x.device).summable()))
        elif self.training and "0" in self.layers:
            self._gates[micro_step.task - 1].append(statistics(outputs, layout, x.device).gate[0])
        return StageInputs(x, sequence_ids)

    def take_report(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean over the main task's micro-batches since the last call of what the layers reported.

        Returns:
            The regulariser () and the statistics (5, layers of this part) as ``RoutingStatistics.summable`` has them.
        """
        regularisers, reports = zip(*self._reports, strict=True)
        self._reports.clear()
        return torch.stack(regularisers).mean(0), torch.stack(reports).mean(0)

    def take_gates(self) -> list[list[torch.Tensor]]:
        """Return layer 1's mean gates since the last call, of each auxiliary task; none where layer 1 is elsewhere."""
        gates, self._gates = self._gates, [[] for _ in self._gates]
        return gates


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
    """The last norm and the classification heads as a part of a pipeline.

    It maps ``StageInputs`` to hidden states (m, d), or to logits (B, C) where the micro-batch is labelled.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        group: TensorParallelGroup,
        length: int,
        tasks: Sequence[RunTask],
        heads: Mapping[str, HeadConfig],
    ):
        super().__init__()
        self.config = config
        self.queue = MicroBatchQueue(tasks)
        self.seed = seed
        self.group = group
        self.length = length
        self.norm = RowNorm(config.hidden_size, config.norm_epsilon, group)
        self.classifiers = build_heads(config, heads)
        initialise(self.classifiers, config, seed, group, prefix="classifiers.")

    def forward(self, inputs: StageInputs) -> torch.Tensor:
        hidden_states, sequence_ids = inputs
        _, task = self.queue.take()
        x = self.norm(hidden_states)
        used = task.name if task.head is not None else None
        if self.training:
            x = touch_unused(self.classifiers, used, x)
        if used is None:
            return x
        layout = lay_out(
            self.config,
            sequence_ids[:, 0],
            self.length,
            dropout_seed=self.seed if self.training else None,
            group=self.group,
            lengths=_real_lengths(sequence_ids, task),
        )
        return self.classifiers[used](pool(x, layout), layout)


class StageEmbedding(TiedEmbedding):
    """The tied weight, on the first and on the last stage; neither copy holds anything else that is trained."""

    def __init__(
        self,
        config: ModelConfig,
        seed: int,
        group: TensorParallelGroup,
        tasks: Sequence[RunTask],
        document_end: int | None = None,
    ):
        super().__init__(config, group)
        self.queue = MicroBatchQueue(tasks)
        self.seed = seed
        self.document_end = document_end
        initialise(self, config, seed, group, prefix="embedding")

    def first_part(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> StageInputs:
        """Embed tokens (B, T) with sample ids (B,) into the inputs of the first ``StagePart``."""
        tokens, sample_ids = inputs
        sequences, length = tokens.shape
        _, task = self.queue.take()
        lengths = None
        if task.head is not None:
            tokens, lengths = real_lengths(tokens, task.head)
        layout = BatchLayout(sequences=sequences, length=length, group=self.group)
        if self.training:
            layout = layout.with_dropout_keys(self.seed, sample_ids)
        hidden_states = self(tokens.flatten(), layout=layout)
        columns = [sample_ids, torch.full_like(sample_ids, length) if lengths is None else lengths]
        if self.document_end is not None:
            columns += tokens.unbind(1)
        return StageInputs(hidden_states, torch.stack(columns, 1))

    def last_part(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states (m, d), or logits of a classification, and the weight for the loss.

        The weight is an output of the part because DeepSpeed's bf16 optimizer clears gradients when the first gradient
        reaches an output: a gradient that the loss gave to the weight directly would be lost.
        """
        return hidden_states, self.weight.view_as(self.weight)


class UntiedEmbedding(nn.Module):
    """The embedding as the first part of a pipeline without a language model's head."""

    def __init__(self, config: ModelConfig, seed: int, group: TensorParallelGroup, tasks: Sequence[RunTask]):
        super().__init__()
        self.embedding = StageEmbedding(config, seed, group, tasks)

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> StageInputs:
        return self.embedding.first_part(inputs)


def pipeline_parts(
    config: ModelConfig,
    seed: int,
    group: TensorParallelGroup,
    interval: int | None,
    length: int,
    tasks: Sequence[RunTask],
    document_end: int | None = None,
) -> list:
    """Return DeepSpeed's specifications of all parts; each stage builds the parts that it runs.

    Args:
        config: config of the model.
        seed: seed of the run.
        group: the ranks that share each layer.
        interval: number of layers whose activations are recomputed together; None to keep all activations.
        length: tokens of a sequence, T.
        tasks: of the run.
        document_end: token id after which attention starts a new document; None where attention crosses documents.
    """

    def embedding(forward: Callable) -> TiedLayerSpec:
        return TiedLayerSpec(
            "embedding",
            StageEmbedding,
            config=config,
            seed=seed,
            group=group,
            tasks=tasks,
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
            tasks=tasks,
            document_end=document_end,
        )
        for indices in layer_groups(config, interval)
    ]
    heads = {task.name: task.head for task in tasks if task.head is not None}
    norm = LayerSpec(StageNorm, config=config, seed=seed, group=group, length=length, tasks=tasks, heads=heads)
    if tasks[0].head is not None:
        first = LayerSpec(UntiedEmbedding, config=config, seed=seed, group=group, tasks=tasks)
        return [first, *layers, norm, LayerSpec(nn.Identity)]
    return [embedding(StageEmbedding.first_part), *layers, norm, embedding(StageEmbedding.last_part)]
