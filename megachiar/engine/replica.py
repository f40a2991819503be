"""A replica of the model on one rank or one tensor-parallel group, trained by DeepSpeed's engine under ZeRO 0 to 3."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from megachiar.config import RunConfig
from megachiar.engine import deepspeed_patches
from megachiar.engine.initialize import initialize
from megachiar.engine.optimizer import build_optimizer
from megachiar.engine.step_gate import StepGate
from megachiar.engine.step_metrics import RankMetrics, flatten_forward
from megachiar.model import build_model
from megachiar.model.compiled import compile_parts
from megachiar.topology import Topology

MicroBatches = Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""Inputs (B, T), targets (B, T) and sample ids (B,) of each micro-batch, on the device."""


class Replica:
    """The whole model, or this tensor-parallel rank's shard of every layer."""

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device):
        self.config = config
        self.device = device
        model = build_model(
            config.model,
            seed=config.training.seed,
            group=topology.tensor,
            checkpoint_interval=config.training.activation_checkpoint_interval,
            document_end=config.document_end,
        )
        if config.training.compile is not None:
            compile_parts(model, config.training.compile)
        built = build_optimizer(model, config.optimizer)
        self.gate = StepGate(built.optimizer)
        self.optimizer_implementation = built.implementation
        mpu = ModelParallelUnit(topology) if topology.tensor.size > 1 else None
        self.deepspeed = initialize(config, model, built.optimizer, mpu)
        self._forward: list[torch.Tensor] = []
        self._norm: torch.Tensor | None = None
        if not config.parallel.zero_stage:
            deepspeed_patches.replace_gradient_clipping(self.deepspeed, self._clip)
            if topology.data_size == 1:
                deepspeed_patches.skip_gradient_reduction(self.deepspeed)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters, or its shards of them, with their names in the model."""
        return self.deepspeed.module.named_parameters()

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the buffers, which are drawn at the start and never trained, with their names in the model."""
        return self.deepspeed.module.named_buffers()

    def step(self, micro_batches: MicroBatches) -> None:
        """Run forward and backward passes over the micro-batches of one step, and the optimizer's step."""
        self.deepspeed.train()
        self._forward.clear()
        for inputs, targets, sample_ids in micro_batches:
            output = self.deepspeed(inputs, targets, sample_ids)
            self.deepspeed.backward(output.loss + output.regulariser)
            self._forward.append(flatten_forward(output.loss, output.regulariser, output.statistics))
            self._norm = self._unclipped_norm()
            self.deepspeed.step()

    def measure(self) -> RankMetrics:
        """Return what this rank has measured in the current step, once its gradients are reduced."""
        norm = deepspeed_patches.gradient_norm(self.deepspeed) if self._norm is None else self._norm.item()
        return RankMetrics(forward=torch.stack(self._forward).mean(0).tolist(), gradient_norm=norm)

    def evaluate(self, inputs: torch.Tensor, targets: torch.Tensor, sample_ids: torch.Tensor) -> float:
        """Return the cross-entropy of inputs and targets (B, T) in nats, summed over the targets; ids are (B,)."""
        self.deepspeed.eval()
        with torch.no_grad():
            return self.deepspeed(inputs, targets, sample_ids).token_losses.double().sum().item()

    def _unclipped_norm(self) -> torch.Tensor | None:
        """Return the gradient norm before clipping under ZeRO 0; None where DeepSpeed reports it, or between steps.

        DeepSpeed has reduced the gradients over the ranks by the time this is called.
        """
        if self.config.parallel.zero_stage or not self.deepspeed.is_gradient_accumulation_boundary():
            return None
        gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def _clip(self) -> None:
        """Clip the gradients by the norm that ``step`` has computed; DeepSpeed calls this only where it clips."""
        limit = self.config.optimizer.clip_gradient_norm
        assert limit is not None and self._norm is not None
        nn.utils.clip_grads_with_norm_(self.deepspeed.module.parameters(), limit, self._norm)


class ModelParallelUnit:
    """The process groups under the method names that DeepSpeed asks for: its ``mpu``, from Megatron."""

    def __init__(self, topology: Topology):
        self._topology = topology

    def get_model_parallel_rank(self) -> int:
        return self._topology.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._topology.tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._topology.tensor.handle

    def get_data_parallel_rank(self) -> int:
        return self._topology.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._topology.data_group
