"""A replica of the model in stages, trained by DeepSpeed's PipelineEngine (1F1B) under ZeRO 1.

    stage 0   F0 F1 F2    B0 F3 B1 F4 B2 ...      Fi, Bi: forward and backward of micro-batch i; a stage keeps at
    stage 1      F0 F1 B0 F2 B1 F3 B2 ...         most (stages - its number) micro-batches' activations

What travels between stages (``StageInputs``) is one floating tensor, the hidden states, and the sample ids (and where
documents begin, if attention keeps to them), which need no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
from torch import nn

from megachiar.config import RunConfig
from megachiar.config.deepspeed import to_deepspeed
from megachiar.engine import deepspeed_patches
from megachiar.engine.optimizer import build_optimizer
from megachiar.engine.pipeline_stages import StagePart, pipeline_parts
from megachiar.engine.replica import MicroBatches
from megachiar.engine.step_metrics import STATISTICS, RankMetrics, flatten_forward
from megachiar.model.compiled import compile_parts
from megachiar.planning.partition import stage_bounds
from megachiar.topology import Topology


class Stages(deepspeed_patches.BoundedPipeline):
    """This rank's stage with the loss of the tied head."""

    def __init__(self, parts: list, bounds: list[int], topology: Any):
        self.losses: list[torch.Tensor] = []
        super().__init__(parts, bounds, topology, self.loss)

    def loss(self, outputs: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """Mean loss a token in training, which is kept for the log; the sum over tokens in evaluation."""
        result = self.tied_module("embedding").loss(*outputs, targets.flatten())
        if not self.training:
            return result.token_losses.double().sum()
        self.losses.append(result.loss.detach())
        return result.loss


class PipelineReplica:
    """One stage of the model and its part in each step."""

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device):
        self.config, self.topology, self.device = config, topology, device
        interval, length = config.training.activation_checkpoint_interval, config.sequence_length
        model, seed = config.model, config.training.seed
        parts = pipeline_parts(model, seed, topology.tensor, interval, length, config.document_end)
        bounds = stage_bounds(
            config.model, interval, length, config.model.expected_attention_share, topology.pipeline_size
        )
        grid = deepspeed_patches.pipeline_topology(topology.pipeline_size, topology.tensor.size, topology.data_size)
        stages = Stages(parts, bounds, grid)
        if config.training.compile is not None:
            compile_parts(stages, config.training.compile)
        built = build_optimizer(stages, config.optimizer)
        self.optimizer_implementation = built.implementation
        self.deepspeed, *_ = deepspeed.initialize(
            model=stages, optimizer=built.optimizer, config=to_deepspeed(config), dist_init_required=False
        )
        self._parts = [module for module in stages.modules() if isinstance(module, StagePart)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names without the number that DeepSpeed puts before a part's."""
        return _in_the_model(self.deepspeed.module.named_parameters())

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        return _in_the_model(self.deepspeed.module.named_buffers())

    def step(self, micro_batches: MicroBatches) -> RankMetrics:
        """All micro-batches of the step through the pipeline, and the optimizer step."""
        scale = deepspeed_patches.loss_scale(self.deepspeed) / self.deepspeed.gradient_accumulation_steps()
        for part in self._parts:
            part.regulariser_scale = scale
        batches = (((inputs, sample_ids), targets) for inputs, targets, sample_ids in micro_batches)
        self.deepspeed.train_batch(batches)
        norm = float(self.deepspeed.get_global_grad_norm() or 0.0)
        return RankMetrics(forward=self._forward_metrics().tolist(), gradient_norm=norm)

    def evaluate(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        """Summed cross-entropy in nats on the last stage; 0 on the others."""
        sample_ids = torch.zeros(len(inputs), dtype=torch.long, device=self.device)
        batches = iter([((inputs, sample_ids), targets)])
        outputs = self.deepspeed.eval_batch(batches, reduce_output=None, bcast_loss=False, num_micro_batches=1)
        return outputs[0].item() if self.topology.is_last_stage else 0.0

    def _forward_metrics(self) -> torch.Tensor:
        """Return what this stage measured since the last call, float64 on the CPU; 0 for what other stages know."""
        losses = self.deepspeed.module.losses
        loss = torch.stack(losses).double().mean().cpu() if losses else torch.zeros(())
        losses.clear()
        regulariser = torch.zeros((), dtype=torch.float64)
        statistics = torch.zeros(len(STATISTICS), self.config.model.num_layers, dtype=torch.float64)
        for part in self._parts:
            added, of_part = part.take_report()
            regulariser += added.double().cpu()
            statistics[:, [int(index) for index in part.layers]] = of_part.double().cpu()
        return flatten_forward(loss, regulariser, statistics)


def _in_the_model(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in named:
        yield deepspeed_patches.without_part_number(name), tensor
