"""A replica of the model in pipeline stages, trained by DeepSpeed's PipelineEngine (1F1B) under ZeRO 1.

    stage 0   F0 F1 F2    B0 F3 B1 F4 B2 ...      Fi, Bi: forward and backward of micro-batch i; a stage keeps the
    stage 1      F0 F1 B0 F2 B1 F3 B2 ...         activations of at most (stages - its number) micro-batches

Stages send each other ``StageInputs``: the hidden states, which have a gradient, and integers that need none. The
integers are the sample ids, the lengths and, where attention keeps to documents, the tokens. A step of mixed training
has as many micro-batches as its draws make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from megachiar.config import RunConfig
from megachiar.config.tasks import RunTask
from megachiar.engine import deepspeed_patches
from megachiar.engine.initialize import initialize
from megachiar.engine.micro_batches import MicroBatch, MicroStep
from megachiar.engine.optimizer import build_optimizer
from megachiar.engine.pipeline_stages import MicroBatchQueue, StageEmbedding, StageNorm, StagePart, pipeline_parts
from megachiar.engine.running_routers import RunningRouters
from megachiar.engine.step_clock import StepClock
from megachiar.engine.step_gate import StepGate
from megachiar.engine.step_metrics import STATISTICS, flatten_auxiliary, flatten_forward, flatten_rank
from megachiar.model.classifier import classifier_loss
from megachiar.model.compiled import compile_layers
from megachiar.model.static_shapes import has_static_shapes, use_static_shapes
from megachiar.phases import phase
from megachiar.planning.partition import stage_bounds
from megachiar.topology import Topology

NamedTensor = TypeVar("NamedTensor", bound=torch.Tensor)


class StageModule(deepspeed_patches.BoundedPipeline):
    """The part of the model on this rank's stage, and the loss that the last stage computes.

    Attributes:
        losses: mean loss of each micro-batch since they were last read, of each task; empty on the other stages.
    """

    def __init__(self, parts: list, bounds: list[int], topology: Any, tasks: Sequence[RunTask]):
        self.losses: list[list[torch.Tensor]] = [[] for _ in tasks]
        self.queue = MicroBatchQueue(tasks)
        super().__init__(parts, bounds, topology, self._named_loss)

    def _named_loss(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        with phase("loss"):
            return self.loss(outputs, targets)

    def loss(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean loss in training. In evaluation, return the sum of losses and predicted classes.

        Args:
            outputs: hidden states (m, d), or logits (B, C), with the tied weight, as ``StageEmbedding.last_part``
                returns them; logits alone in a classification run.
            targets: (B, T) int64, or labels (B,) int64.

        Returns:
            A scalar in training; (1,) float64 in evaluation, or (1 + B,) with the predicted class of each sequence.
        """
        micro_step, task = self.queue.take()
        if task.head is not None:
            logits = outputs[0] if isinstance(outputs, tuple) else outputs
            of_labels = classifier_loss(logits, targets)
            loss, token_losses = of_labels.loss, of_labels.sequence_losses
        else:
            embedding = self.tied_module("embedding")
            assert isinstance(embedding, StageEmbedding)
            hidden_states, weight = outputs
            of_tokens = embedding.loss(hidden_states, weight, targets.flatten())
            loss, token_losses = of_tokens.loss, of_tokens.token_losses
        if not self.training:
            predicted = logits.argmax(-1).double() if task.head is not None else token_losses.new_zeros(0).double()
            return torch.cat([token_losses.double().sum()[None], predicted])
        self.losses[micro_step.task].append(loss.detach())
        return loss * micro_step.weight if micro_step.task else loss


class PipelineReplica:
    """One pipeline stage of the model, with the same methods as ``Replica``."""

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device, clock: StepClock):
        self.config = config
        self.clock = clock
        self.topology = topology
        self.device = device
        stage = _build_stage(config, topology)
        if has_static_shapes(config, device):
            use_static_shapes(stage)
        if config.training.compile is not None:
            recomputes = config.training.activation_checkpoint_interval is not None
            compile_layers(stage, config.training.compile, config.data.document_mask, recomputes)
        built = build_optimizer(stage, config.optimizer)
        self.gate = StepGate(built.optimizer)
        self.routers = RunningRouters(stage, config.model)
        self.optimizer_implementation = built.implementation
        self.moments_of = built.moments_of
        self.deepspeed = initialize(config, stage, built.optimizer)
        built.place(config.parallel.zero_stage, topology)
        self._parts = [module for module in stage.modules() if isinstance(module, StagePart)]
        queued = (module for module in stage.modules() if isinstance(module, StagePart | StageNorm | StageEmbedding))
        self._queues = [stage.queue, *(module.queue for module in queued)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this stage's parameters, or this rank's shards of them, with their names in the model."""
        return _with_names_in_model(self.deepspeed.module.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield this stage's buffers, which are drawn at the start and never trained, with their names in the model."""
        return _with_names_in_model(self.deepspeed.module.named_buffers())

    def step(self, micro_batches: Iterator[MicroBatch], plan: Sequence[MicroStep]) -> None:
        """Send the micro-batches of one step through the pipeline, forward and backward, and step the optimizer.

        ``plan`` says what each micro-batch is for.
        """
        scale = deepspeed_patches.loss_scale(self.deepspeed) / self.deepspeed.gradient_accumulation_steps()
        for part in self._parts:
            part.regulariser_scale = scale
        self.routers.begin_step(scale)
        self._fill_queues(plan)
        deepspeed_patches.set_micro_batches(self.deepspeed, len(plan))
        read = self.clock.reading(micro_batches)
        self.deepspeed.train_batch(((batch.inputs, batch.sample_ids), batch.targets) for batch in read)

    def measure(self) -> torch.Tensor:
        """Return what this rank has measured in the current step, once its gradients are reduced: see ``flatten_rank``.

        The vector is on the device, and nothing has waited for it. Call it once in a step.
        """
        return flatten_rank(
            forward=self._forward_metrics(),
            auxiliary=self._auxiliary_metrics(),
            values=self.routers.measure(self.device),
            gradient_norm=deepspeed_patches.gradient_norm(self.deepspeed),
        )

    def evaluate(self, inputs: torch.Tensor, targets: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy in nats, summed over the targets, () float64, on the last stage; 0 on the others.

        ``inputs`` and ``targets`` are (B, T), ``sample_ids`` (B,).
        """
        return self._evaluate(inputs, targets, sample_ids, 0)[0]

    def classify(
        self, inputs: torch.Tensor, labels: torch.Tensor, sample_ids: torch.Tensor, task: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy of sequences (B, T) and labels (B,) in nats, summed, and the predicted classes (B,).

        The last stage returns them, and the others zeros. ``task`` is the number of the classification. The sum is
        () float64, the classes are int64.
        """
        outputs = self._evaluate(inputs, labels, sample_ids, task)
        return outputs[0], outputs[1:].long()

    def _evaluate(
        self, inputs: torch.Tensor, targets: torch.Tensor, sample_ids: torch.Tensor, task: int
    ) -> torch.Tensor:
        """Return what ``StageModule.loss`` returns for a micro-batch; zeros on all stages but the last."""
        self._fill_queues([MicroStep(task)])
        outputs = deepspeed_patches.evaluate_micro_batch(self.deepspeed, ((inputs, sample_ids), targets))
        if self.topology.is_last_stage:
            return outputs[0]
        return torch.zeros(1 + len(inputs), dtype=torch.float64, device=self.device)

    def _fill_queues(self, plan: Sequence[MicroStep]) -> None:
        for queue in self._queues:
            queue.fill(plan)

    def _auxiliary_metrics(self) -> torch.Tensor:
        """Return what this stage measured of the auxiliary tasks since the last call; 0 for what other stages know."""
        losses = [list(of_task) for of_task in self.deepspeed.module.losses[1:]]
        for of_task in self.deepspeed.module.losses[1:]:
            of_task.clear()
        gates: list[list[torch.Tensor]] = [[] for _ in losses]
        for part in self._parts:
            for of_task, more in zip(gates, part.take_gates(), strict=True):
                of_task += more
        return flatten_auxiliary(losses, gates, self.device)

    def _forward_metrics(self) -> torch.Tensor:
        """Return what this stage measured since the last call, (2 + 5L,) float64; 0 for what other stages know."""
        shape = len(STATISTICS), self.config.model.num_layers
        statistics = torch.zeros(shape, dtype=torch.float64, device=self.device)
        regulariser = statistics.new_zeros(())
        losses = self.deepspeed.module.losses[0]
        loss = torch.stack(losses).double().mean() if losses else statistics.new_zeros(())
        losses.clear()
        for part in self._parts:
            part_regulariser, part_statistics = part.take_report()
            regulariser += part_regulariser.double()
            for index, of_layer in zip(part.layers, part_statistics.double().unbind(1), strict=True):
                statistics[:, int(index)] = of_layer
        return flatten_forward(loss, regulariser, statistics)


def _build_stage(config: RunConfig, topology: Topology) -> StageModule:
    """Return the module of this rank's stage; stages are cut so that their FLOPs are balanced."""
    interval = config.training.activation_checkpoint_interval
    parts = pipeline_parts(
        config.model,
        seed=config.training.seed,
        group=topology.tensor,
        interval=interval,
        length=config.sequence_length,
        tasks=config.tasks,
        document_end=config.document_end,
    )
    bounds = stage_bounds(
        config.model,
        interval=interval,
        length=config.sequence_length,
        attention_share=config.model.expected_attention_share,
        stages=topology.pipeline_size,
    )
    ranks = deepspeed_patches.pipeline_topology(topology.pipeline_size, topology.tensor.size, topology.data_size)
    return StageModule(parts, bounds, ranks, config.tasks)


def _with_names_in_model(named: Iterable[tuple[str, NamedTensor]]) -> Iterator[tuple[str, NamedTensor]]:
    """Yield the tensors under names without the part's number that DeepSpeed puts before them."""
    for name, tensor in named:
        yield deepspeed_patches.without_part_number(name), tensor
