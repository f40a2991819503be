"""DeepSpeed behind one ``train_step``: forward, backward, gradient reduction, clipping and AdamW."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from megachiar.config import RunConfig
from megachiar.console import silence
from megachiar.engine import deepspeed_patches
from megachiar.engine.pipeline import PipelineReplica
from megachiar.engine.replica import Replica
from megachiar.engine.step_metrics import StepResult, flatten_step, unflatten_step
from megachiar.errors import UserError
from megachiar.kernels import gpu
from megachiar.topology import Topology


def start_process_group(config: RunConfig, topology: Topology) -> torch.device:
    """Join the other ranks; returns this rank's device (its GPU, or the CPU)."""
    if torch.cuda.is_available():
        if topology.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {topology.rank}",
                f"LOCAL_RANK {topology.local_rank} but {torch.cuda.device_count()} GPUs are visible",
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
    deepspeed.init_distributed(
        "nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(seconds=config.training.communication_timeout_s),
    )
    return device


def choose_kernels(config: RunConfig, device: torch.device) -> None:
    """Let this process use Triton kernels or not, as ``precision.kernels`` says.

    Raises:
        UserError: they are wanted and cannot be had.
    """
    kernels = config.precision.kernels
    gpu.allow(kernels != "torch")
    lack = gpu.why_not(device)
    if kernels == "triton" and lack is not None:
        raise UserError(
            "precision.kernels", f"is triton, but {lack}", "use auto, or a GPU and pip install 'megachiar[gpu]'"
        )


def check_compiler(config: RunConfig, device: torch.device) -> None:
    """
    Raises:
        UserError: ``training.compile`` needs a C++ compiler that is not there.
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
    """A model, its optimizer and the ranks it is trained on.

    One rank or tensor group runs a whole ``Replica`` of the model; with several stages each runs its piece of a
    ``PipelineReplica``. Both take micro-batches and report alike.
    """

    def __init__(self, config: RunConfig, topology: Topology, device: torch.device):
        self.config, self.topology, self.device = config, topology, device
        if device.type == "cpu" and config.precision.compute == "fp16":
            deepspeed_patches.allow_fp16_on_cpu()
        with silence():
            deepspeed_patches.import_muon_uncompiled()
            kind = PipelineReplica if topology.pipeline_size > 1 else Replica
            self.replica = kind(config, topology, device)
        self._skipped_before = 0
        # Scalars travel over gloo in float64: no GPU stream waits for them.
        self.control = dist.new_group(backend="gloo") if device.type == "cuda" else dist.group.WORLD

    @property
    def deepspeed(self) -> deepspeed.DeepSpeedEngine:
        return self.replica.deepspeed

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one step on each replica."""
        return self.deepspeed.gradient_accumulation_steps()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters, or its parts of them, by their names in the model."""
        return self.replica.named_parameters()

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As ``named_parameters``, of what is drawn and never trained."""
        return self.replica.named_buffers()

    @property
    def skipped_steps(self) -> int:
        """Steps of the run whose gradients overflowed in fp16."""
        return self._skipped_before + deepspeed_patches.skipped_steps(self.deepspeed)

    @skipped_steps.setter
    def skipped_steps(self, count: int) -> None:
        self._skipped_before = count - deepspeed_patches.skipped_steps(self.deepspeed)

    def train_step(
        self, micro_batches: Iterable[tuple[int, np.ndarray]], learning_rate: float, stop: bool = False
    ) -> StepResult:
        """One optimizer step.

        Args:
            micro_batches: ``accumulation_steps`` pairs of (global number of its first sample, tokens
                (micro-batch, T + 1) int64). Inner stages of a pipeline read none.
            learning_rate: for this step.
            stop: whether this rank was asked to stop; the result says whether any was.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        skipped_before = self.skipped_steps
        metrics = self.replica.step(self._on_device(micro_batches))
        values = flatten_step(
            metrics,
            skipped=self.skipped_steps > skipped_before,
            stop=stop,
            is_last_stage=self.topology.is_last_stage,
        )
        return unflatten_step(self.mean_over_world(values), self.config.model.num_layers)

    def _on_device(
        self, micro_batches: Iterable[tuple[int, np.ndarray]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Inputs (B, T), targets (B, T) and sample ids (B,)."""
        for first_sample, batch in micro_batches:
            tokens = torch.from_numpy(batch).to(self.device, non_blocking=True)
            sample_ids = torch.arange(first_sample, first_sample + len(batch), device=self.device)
            yield tokens[:, :-1], tokens[:, 1:], sample_ids

    def evaluate(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        """Summed cross-entropy (nats) and number of targets (those not -100) of this replica's ``(n, T)`` windows.

        Ranks that share a replica tell a part of it: summed over all ranks it is counted once.
        """
        missing = self.config.training.micro_batch_size - len(inputs)
        if missing and self.topology.model_size > 1:  # stages and shards of rows are of one size
            inputs = np.pad(inputs, ((0, missing), (0, 0)))
            targets = np.pad(targets, ((0, missing), (0, 0)), constant_values=-100)
        nats = self.replica.evaluate(
            torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device)
        )
        if not (self.topology.is_last_stage and self.topology.tensor.rank == 0):
            return 0.0, 0
        return nats, int((targets != -100).sum())

    def mean_over_world(self, values: list[float]) -> list[float]:
        """Mean of each number over replicas and the ranks that share their rows; stages add theirs up. In float64."""
        return [value / (self.topology.data_size * self.topology.tensor.size) for value in self.sum_over_world(values)]

    def sum_over_world(self, values: list[float]) -> list[float]:
        """Sum of each number over all ranks of the run, not those of a tensor-parallel group, in float64."""
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self.control)
        return summed.tolist()

    def barrier(self) -> None:
        dist.barrier(group=self.control)
