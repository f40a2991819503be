"""A replica of the model in pipeline stages, trained by DeepSpeed's PipelineEngine (1F1B) under ZeRO 1.

    stage 0   F0 F1 F2    B0 F3 B1 F4 B2 ...      Fi, Bi: forward and backward of micro-batch i; a stage keeps the
    stage 1      F0 F1 B0 F2 B1 F3 B2 ...         activations of at most (stages - its number) micro-batches

Stages send each other ``StageInputs``: the hidden states, which have a gradient, and integers that need none. The
integers are the sample ids and, where attention keeps to documents, the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from megachiar.config import RunConfig
from megachiar.engine import deepspeed_patches
from megachiar.engine.initialize import initialize
from megachiar.engine.optimizer import build_optimizer
from megachiar.engine.pipeline_stages import StageEmbedding, StagePart, pipeline_parts
from megachiar.engine.replica import MicroBatches
from megachiar.engine.step_gate import StepGate
from megachiar.engine.step_metrics import STATISTICS, RankMetrics, flatten_forward
from megachiar.model.compiled import compile_parts
from megachiar.planning.partition import stage_bounds
from megachiar.topology import Topology

NamedTensor = TypeVar("NamedTensor", bound=torch.Tensor)


class StageModule(deepspeed_patches.BoundedPipeline):
    """The part of the model on this rank's stage, and the loss that the last stage computes.

    Attributes:
        losses: mean loss per token of each micro-batch since they were last read; empty on the other stages.
    """

    def __init__(self, parts: list, bounds: list[int], topology: Any):
        self.losses: list[torch.Tensor] = []
        super().__init__(parts, bounds, topology, self.loss)

    def loss(self, outputs: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss per token in training, and the sum over tokens in evaluation.

        Args:
            outputs: hidden states (m, d) and the tied weight, as ``StageEmbedding.last_part`` returns them.
            targets: (B, T) int64.
        """
        embedding = self.tied_module("embedding")
        assert isinstance(embedding, StageEmbedding)
        result = embedding.loss(*outputs, targets.flatten())
        if not self.training:
            return result.token_losses.double().sum()
        self.losses.append(result.loss.detach())
        return result.loss


class PipelineReplica:
    """One pipeline stage of the model, with the same methods as ``Replica``."""

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device):
        self.config = config
        self.topology = topology
        self.device = device
        stage = _build_stage(config, topology)
        if config.training.compile is not None:
            compile_parts(stage, config.training.compile)
        built = build_optimizer(stage, config.optimizer)
        self.gate = StepGate(built.optimizer)
        self.optimizer_implementation = built.implementation
        self.deepspeed = initialize(config, stage, built.optimizer)
        self._parts = [module for module in stage.modules() if isinstance(module, StagePart)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this stage's parameters, or this rank's shards of them, with their names in the model."""
        return _with_names_in_model(self.deepspeed.module.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield this stage's buffers, which are drawn at the start and never trained, with their names in the model."""
        return _with_names_in_model(self.deepspeed.module.named_buffers())

    def step(self, micro_batches: MicroBatches) -> None:
        """Send the micro-batches of one step through the pipeline, forward and backward, and step the optimizer."""
        scale = deepspeed_patches.loss_scale(self.deepspeed) / self.deepspeed.gradient_accumulation_steps()
        for part in self._parts:
            part.regulariser_scale = scale
        batches = (((inputs, sample_ids), targets) for inputs, targets, sample_ids in micro_batches)
        self.deepspeed.train_batch(batches)

    def measure(self) -> RankMetrics:
        """Return what this rank has measured in the current step, once its gradients are reduced; call it once."""
        norm = deepspeed_patches.gradient_norm(self.deepspeed)
        return RankMetrics(forward=self._forward_metrics().tolist(), gradient_norm=norm)

    def evaluate(self, inputs: torch.Tensor, targets: torch.Tensor, sample_ids: torch.Tensor) -> float:
        """Return the cross-entropy in nats, summed over the targets, on the last stage; 0 on the others.

        ``inputs`` and ``targets`` are (B, T), ``sample_ids`` (B,).
        """
        outputs = deepspeed_patches.evaluate_micro_batch(self.deepspeed, ((inputs, sample_ids), targets))
        return outputs[0].item() if self.topology.is_last_stage else 0.0

    def _forward_metrics(self) -> torch.Tensor:
        """Return what this stage measured since the last call, float64 on the CPU; 0 for what other stages know."""
        losses = self.deepspeed.module.losses
        loss = torch.stack(losses).double().mean().cpu() if losses else torch.zeros(())
        losses.clear()
        regulariser = torch.zeros((), dtype=torch.float64)
        statistics = torch.zeros(len(STATISTICS), self.config.model.num_layers, dtype=torch.float64)
        for part in self._parts:
            part_regulariser, part_statistics = part.take_report()
            regulariser += part_regulariser.double().cpu()
            statistics[:, [int(index) for index in part.layers]] = part_statistics.double().cpu()
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
    return StageModule(parts, bounds, ranks)


def _with_names_in_model(named: Iterable[tuple[str, NamedTensor]]) -> Iterator[tuple[str, NamedTensor]]:
    """Yield the tensors under names without the part's number that DeepSpeed puts before them."""
    for name, tensor in named:
        yield deepspeed_patches.without_part_number(name), tensor
