"""DeepSpeed behind one call, ``Engine.train_step``: forward, backward, gradient reduction, clipping and optimizer."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megachiar.config import RunConfig
from megachiar.console import silence
from megachiar.engine import deepspeed_patches
from megachiar.engine.confusion import confusion_matrix
from megachiar.engine.host_copies import NumberReader, to_device
from megachiar.engine.micro_batches import MicroStep, main_steps, on_device
from megachiar.engine.pipeline import PipelineReplica
from megachiar.engine.replica import Replica
from megachiar.engine.running_routers import value_layers
from megachiar.engine.step_clock import step_clock
from megachiar.engine.step_metrics import StepResult, flatten_step, unflatten_step
from megachiar.errors import UserError
from megachiar.kernels import gpu
from megachiar.kernels.ignored_target import IGNORED_TARGET, PADDING
from megachiar.model.transformer import ChiarFormer
from megachiar.topology import Topology


def start_process_group(config: RunConfig, topology: Topology) -> torch.device:
    """Start the default process group, in which all ranks of the run meet, and set up this rank's device.

    Returns:
        The device of this rank: its GPU, or the CPU where there is none.

    Raises:
        UserError: a GPU, a compiler or a kernel that the config asks for is missing, or DeepSpeed lacks a private name
            that we use.
    """
    if torch.cuda.is_available():
        if topology.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {topology.rank}",
                f"has LOCAL_RANK {topology.local_rank} but {torch.cuda.device_count()} GPUs are visible",
                "start one rank per GPU",
            )
        device = torch.device("cuda", topology.local_rank)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = config.precision.tf32
    else:
        device = torch.device("cpu")
    choose_kernels(config, device)
    check_compiler(config, device)
    deepspeed_patches.check_deepspeed_version()
    deepspeed_patches.skip_compiled_collectives()
    timeout = datetime.timedelta(seconds=config.training.communication_timeout_s)
    deepspeed_patches.limit_group_timeouts(timeout)
    deepspeed.init_distributed(
        "nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timeout,
    )
    return device


def choose_kernels(config: RunConfig, device: torch.device) -> None:
    """Let this process use Triton kernels, or keep it from them, as ``precision.kernels`` says.

    Raises:
        UserError: the config demands Triton kernels, and they do not run on ``device``.
    """
    kernels = config.precision.kernels
    gpu.allow(kernels != "torch")
    reason = gpu.why_not(device)
    if kernels == "triton" and reason is not None:
        raise UserError(
            "precision.kernels", f"is triton, but {reason}", "use auto, or a GPU and pip install 'megachiar[gpu]'"
        )


def check_compiler(config: RunConfig, device: torch.device) -> None:
    """Check that there is a C++ compiler where ``training.compile`` needs one.

    Raises:
        UserError: ``training.compile`` is inductor on a CPU, and the machine has no C++ compiler.
    """
    if config.training.compile != "inductor" or device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UserError(
            "training.compile",
            "is inductor, but there is no C++ compiler on this machine",
            "install g++ or name one in CXX, or set training.compile to null",
        ) from None


class Engine:
    """A model with its optimizer, trained by all ranks together.

    Without pipeline stages each rank, or tensor-parallel group, runs a ``Replica`` of the whole model. With several
    stages each rank runs its stage of a ``PipelineReplica``. The two have the same methods.

    Attributes:
        replica: this rank's part of the model with its optimizer.
        clock: splits the time of steps into phases.
        control: a gloo group of all ranks. Scalars are summed over it in float64, so that no GPU stream waits for them.
        skipped_steps: number of steps of the run that were left out, which a resumed run goes on from.
    """

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device):
        self.config = config
        self.topology = topology
        self.device = device
        self.clock = step_clock(device, topology.pipeline_size)
        if device.type == "cpu" and config.precision.compute == "fp16":
            deepspeed_patches.allow_fp16_on_cpu()
        with silence():
            deepspeed_patches.import_muon_uncompiled()
            replica_class = PipelineReplica if topology.pipeline_size > 1 else Replica
            self.replica: Replica | PipelineReplica = replica_class(config, topology, device, self.clock)
        deepspeed_patches.keep_running_at_least_loss_scale(self.deepspeed)
        self.skipped_steps = 0
        self._reader = NumberReader(device)
        self.control = dist.new_group(backend="gloo") if device.type == "cuda" else dist.group.WORLD

    @property
    def deepspeed(self) -> deepspeed.DeepSpeedEngine:
        """Return DeepSpeed's engine around this rank's part of the model."""
        return self.replica.deepspeed

    @property
    def accumulation_steps(self) -> int:
        """Return the number of micro-batches that each replica computes in a step."""
        return self.deepspeed.gradient_accumulation_steps()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters, or its shards of them, with their names in the model."""
        return self.replica.named_parameters()

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield this rank's buffers, which are drawn at the start and never trained, with their names in the model."""
        return self.replica.named_buffers()

    @property
    def is_at_least_loss_scale(self) -> bool:
        """Return whether the loss scale of fp16 cannot be lowered after another overflow; False in other precisions."""
        return deepspeed_patches.is_at_least_loss_scale(self.deepspeed)

    def train_step(
        self,
        micro_batches: Iterable[tuple[int, np.ndarray]],
        learning_rate: float,
        stop: bool = False,
        accept: Callable[[StepResult], bool] = lambda result: True,
        plan: Sequence[MicroStep] | None = None,
    ) -> StepResult:
        """Train one step on all ranks.

        A step whose loss or gradients are not finite on any rank, or that ``accept`` refuses, is left out on all ranks:
        it changes neither weights nor moments nor the count of steps.

        Args:
            micro_batches: pairs of the number of a micro-batch's first sample and its samples (micro-batch, T + 1)
                int64, in the order of the plan: tokens, or T tokens padded with -1 and the label of a classification.
                Inner stages of a pipeline read none.
            learning_rate: learning rate of this step.
            stop: whether this rank was asked to stop; the result says whether any rank was.
            accept: says of a step with finite numbers, before it changes anything, whether it is to be taken. It must
                say the same on all ranks.
            plan: what each micro-batch is for, the same on all ranks; None for ``accumulation_steps`` of the main task.
        """
        steps = main_steps(self.accumulation_steps) if plan is None else list(plan)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.clock.begin_step()
        self.replica.gate.begin(lambda skipped: self._agree(skipped, stop, accept))
        self.replica.step(on_device(micro_batches, steps, self.config.tasks, self.device), steps)
        result = self.replica.gate.finish()
        self.skipped_steps += result.skipped
        if not result.skipped:
            self.replica.routers.follow(result.attention_share, result.values)
        self.clock.end_step()
        return result

    def _agree(self, skipped: bool, stop: bool, accept: Callable[[StepResult], bool]) -> StepResult:
        """Return the result of the step that all ranks agree on; every rank calls this method once a step.

        This is the step's one reduction over all ranks, and the one place in it where our code waits for the device. It
        comes before the optimizer changes anything.
        """
        measured = self._reader.read(self.replica.measure())
        vector = flatten_step(measured, skipped=skipped, stop=stop, is_last_stage=self.topology.is_last_stage)
        auxiliary, layers = list(self.config.mixed.tasks), self.config.model.num_layers
        of_values = len(value_layers(self.config.model))
        result = unflatten_step(self.mean_over_world(vector), layers, auxiliary, of_values)
        return result if result.skipped or accept(result) else replace(result, skipped=True)

    def evaluate(self, inputs: np.ndarray, targets: np.ndarray, first_window: int = 0) -> tuple[torch.Tensor, int]:
        """Return the summed cross-entropy in nats, and the number of targets, of this replica's windows.

        Of the ranks that share a replica one returns them and the others return 0, so that a sum over all ranks counts
        each window once. The cross-entropy, () float64, is on the device, and nothing has waited for it.

        Args:
            inputs: tokens (n, T) int64 of at most a micro-batch.
            targets: tokens (n, T) int64; -100 marks what is no target.
            first_window: number of the first window in its set; the others follow it.
        """
        missing = self.config.training.micro_batch_size - len(inputs)
        if missing and self.topology.model_size > 1:  # pipeline stages and row shards work on whole micro-batches
            inputs = np.pad(inputs, ((0, missing), (0, 0)))
            targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=IGNORED_TARGET)
        on_device = to_device(np.stack([inputs, targets]), self.device)
        sample_ids = torch.arange(first_window, first_window + len(inputs), device=self.device)
        nats = self.replica.evaluate(on_device[0], on_device[1], sample_ids)
        if not self._counts_samples:
            return torch.zeros_like(nats), 0
        return nats, int((targets != IGNORED_TARGET).sum())

    @property
    def _counts_samples(self) -> bool:
        """Return whether this rank is the one that counts the samples of its replica."""
        return self.topology.is_last_stage and self.topology.tensor.rank == 0

    def classify(self, samples: np.ndarray, task: int, first_example: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed cross-entropy in nats of labelled sequences, and how often each class was taken for each.

        Of the ranks that share a replica one returns them and the others return zeros, so that a sum over all ranks
        counts each sequence once. Both are on the device, and nothing has waited for them.

        Args:
            samples: (n, T + 1) int64 of at most a micro-batch: tokens padded with -1, and the label.
            task: number of the task.
            first_example: number of the first sequence in its set; the others follow it.

        Returns:
            Nats () float64, and the confusion matrix (C, C) int64 by label and predicted class.
        """
        head = self.config.tasks[task].head
        assert head is not None, "the task is a classification"
        missing = self.config.training.micro_batch_size - len(samples)
        if missing and self.topology.model_size > 1:
            samples = np.pad(samples, ((0, missing), (0, 0)), constant_values=PADDING)
            samples[len(samples) - missing :, -1] = IGNORED_TARGET
        tensor = to_device(samples, self.device)
        labels = tensor[:, -1]
        sample_ids = torch.arange(first_example, first_example + len(samples), device=self.device)
        nats, predicted = self.replica.classify(tensor[:, :-1], labels, sample_ids, task)
        if not self._counts_samples:
            return torch.zeros_like(nats), labels.new_zeros(head.classes, head.classes)
        return nats, confusion_matrix(labels, predicted, head.classes)

    def whole_model(self) -> ChiarFormer:
        """Return the model of this rank in evaluation mode, to read texts of any length; the next step trains it again.

        Only a replica on a single rank, under ZeRO 0 to 2, has the whole model.
        """
        topology, stage = self.topology, self.config.parallel.zero_stage
        assert topology.model_size == 1 and stage < 3, "the config has been checked"
        self.deepspeed.eval()
        model = self.deepspeed.module
        assert isinstance(model, ChiarFormer)
        return model

    def mean_over_world(self, values: list[float]) -> list[float]:
        """Return each number averaged over replicas and tensor-parallel ranks and summed over stages, in float64."""
        return [value / (self.topology.data_size * self.topology.tensor.size) for value in self.sum_over_world(values)]

    def sum_over_world(self, values: list[float]) -> list[float]:
        """Return the sum of each number over all ranks of the run, in float64."""
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self.control)
        return summed.tolist()

    def barrier(self) -> None:
        """Wait until every rank of the run has called this."""
        dist.barrier(group=self.control)
