"""A replica of the model on one rank or one tensor-parallel group, trained by DeepSpeed's engine under ZeRO 0 to 3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from megachiar.config import RunConfig
from megachiar.engine import deepspeed_patches
from megachiar.engine.initialize import initialize
from megachiar.engine.micro_batches import MicroBatch, MicroStep
from megachiar.engine.optimizer import build_optimizer
from megachiar.engine.running_routers import RunningRouters
from megachiar.engine.step_clock import StepClock
from megachiar.engine.step_gate import StepGate
from megachiar.engine.step_metrics import flatten_auxiliary, flatten_forward, flatten_rank
from megachiar.model import build_model
from megachiar.model.captured_layers import CapturedLayers
from megachiar.model.compiled import compile_layers
from megachiar.model.static_shapes import check_kernels_of_graphs, has_static_shapes, use_static_shapes
from megachiar.topology import Topology


class Replica:
    """The whole model, or this tensor-parallel rank's shard of every layer."""

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device, clock: StepClock):
        self.clock = clock
        self.config = config
        self.device = device
        model = build_model(
            config.model,
            seed=config.training.seed,
            group=topology.tensor,
            checkpoint_interval=config.training.activation_checkpoint_interval,
            document_end=config.document_end,
            heads=config.heads,
        )
        if has_static_shapes(config, device):
            use_static_shapes(model)
        if config.training.compile is not None:
            recomputes = config.training.activation_checkpoint_interval is not None
            compile_layers(model, config.training.compile, config.data.document_mask, recomputes)
        if config.training.cuda_graphs is not None:
            check_kernels_of_graphs(config, device)
            model.captured_layers = CapturedLayers(list(model.layers), config.training.cuda_graphs, device)
        built = build_optimizer(model, config.optimizer)
        self.gate = StepGate(built.optimizer)
        self.routers = RunningRouters(model, config.model)
        self.optimizer_implementation = built.implementation
        self.moments_of = built.moments_of
        mpu = ModelParallelUnit(topology) if topology.tensor.size > 1 else None
        self.deepspeed = initialize(config, model, built.optimizer, mpu)
        built.place(config.parallel.zero_stage, topology)
        self._forward: list[torch.Tensor] = []
        self._losses: list[list[torch.Tensor]] = [[] for _ in config.mixed.tasks]
        self._gates: list[list[torch.Tensor]] = [[] for _ in config.mixed.tasks]
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

    def step(self, micro_batches: Iterator[MicroBatch], plan: Sequence[MicroStep]) -> None:
        """Run forward and backward passes over the micro-batches of one step, and the optimizer's step.

        ``plan`` says what each micro-batch is for.
        """
        self.deepspeed.train()
        self._forward.clear()
        for kept in (*self._losses, *self._gates):
            kept.clear()
        accumulated = self.deepspeed.gradient_accumulation_steps()
        self.routers.begin_step(deepspeed_patches.loss_scale(self.deepspeed) / accumulated)
        last = len(plan) - 1
        for number, (micro_step, batch) in enumerate(zip(plan, self.clock.reading(micro_batches), strict=True)):
            if self.config.mixed.tasks:  # a step has as many micro-batches as its draws make
                self.deepspeed.set_gradient_accumulation_boundary(number == last)
            with self.clock.phase("forward"):
                loss = self._forward_pass(batch, micro_step)
            with self.clock.phase("backward"):
                self.deepspeed.backward(loss)
            with self.clock.phase("optimizer"):
                self._norm = self._unclipped_norm()
                self.deepspeed.step()

    def _forward_pass(self, batch: MicroBatch, micro_step: MicroStep) -> torch.Tensor:
        """Return the weighted loss of a micro-batch, and keep what it reports.

        The collapse regulariser is that of the main task.
        """
        head = self.config.tasks[micro_step.task].head
        name = self.config.tasks[micro_step.task].name if head is not None else None
        output = self.deepspeed(batch.inputs, batch.targets, batch.sample_ids, head=name)
        if micro_step.task == 0:
            self._forward.append(flatten_forward(output.loss, output.regulariser, output.statistics.summable()))
            return output.loss + output.regulariser
        self._losses[micro_step.task - 1].append(output.loss.detach())
        self._gates[micro_step.task - 1].append(output.statistics.gate[0])
        return output.loss * micro_step.weight

    def measure(self) -> torch.Tensor:
        """Return what this rank has measured in the current step, once its gradients are reduced: see ``flatten_rank``.

        The vector is on the device, and nothing has waited for it.
        """
        return flatten_rank(
            forward=torch.stack(self._forward).mean(0),
            auxiliary=flatten_auxiliary(self._losses, self._gates, self.device),
            values=self.routers.measure(self.device),
            gradient_norm=deepspeed_patches.gradient_norm(self.deepspeed) if self._norm is None else self._norm,
        )

    def evaluate(self, inputs: torch.Tensor, targets: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of inputs and targets (B, T) in nats, summed over the targets, () float64.

        ``sample_ids`` are (B,).
        """
        self.deepspeed.eval()
        with torch.no_grad():
            return self.deepspeed(inputs, targets, sample_ids).token_losses.double().sum()

    def classify(
        self, inputs: torch.Tensor, labels: torch.Tensor, sample_ids: torch.Tensor, task: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the cross-entropy of sequences (B, T) and labels (B,) in nats, summed, and the predicted classes (B,).

        ``task`` is the number of the classification. The sum is () float64, the classes are int64.
        """
        self.deepspeed.eval()
        with torch.no_grad():
            output = self.deepspeed(inputs, labels, sample_ids, head=self.config.tasks[task].name)
        return output.token_losses.double().sum(), output.logits.argmax(-1)

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
