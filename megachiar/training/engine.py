"""DeepSpeed behind one ``train_step``: forward, backward, gradient reduction, clipping and AdamW."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from megachiar.config import RunConfig
from megachiar.config.deepspeed import to_deepspeed
from megachiar.console import silence
from megachiar.errors import UserError
from megachiar.model import ChiarFormer, ModelOutput
from megachiar.topology import Topology
from megachiar.training.optimizer import build_optimizer


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, averaged over micro-batches and data-parallel ranks. Floats are float64.

    Attributes:
        loss: mean cross-entropy a token, in nats.
        regulariser: what was added to it.
        gradient_norm: global L2 norm before clipping.
        skipped: an fp16 overflow: no parameter changed.
        stop: a rank was asked to stop.
        attention_share, rbf_share, entropy: one value a layer; entropy is nan where a layer does not route.
        gate: mean g of the MetaRouter; nan without one.
    """

    loss: float
    regulariser: float
    gradient_norm: float
    skipped: bool
    stop: bool
    attention_share: list[float]
    rbf_share: list[float]
    entropy: list[float]
    gate: float


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
    deepspeed.init_distributed(
        "nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(seconds=config.training.communication_timeout_s),
    )
    return device


class Engine:
    """A model, its optimizer and the ranks it is trained on."""

    def __init__(self, config: RunConfig, topology: Topology, model: ChiarFormer, device: torch.device):
        built = build_optimizer(model, config.optimizer)
        self.optimizer_implementation = built.implementation
        self.config, self.topology, self.device = config, topology, device
        if device.type == "cpu" and config.precision.compute == "fp16":
            allow_fp16_on_cpu()
        with silence():
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=built.optimizer, config=to_deepspeed(config), dist_init_required=False
            )
        # Scalars travel over gloo in float64: no GPU stream waits for them.
        self.control = dist.new_group(backend="gloo") if device.type == "cuda" else dist.group.WORLD

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one step on each rank."""
        return self.deepspeed.gradient_accumulation_steps()

    def train_step(
        self, micro_batches: Iterable[tuple[int, np.ndarray]], learning_rate: float, stop: bool = False
    ) -> StepResult:
        """One optimizer step.

        Args:
            micro_batches: ``accumulation_steps`` pairs of (global number of its first sample, tokens
                (micro-batch, T + 1) int64).
            learning_rate: for this step.
            stop: whether this rank was asked to stop; the result says whether any was.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self.deepspeed.train()
        skipped_before = self.deepspeed.skipped_steps
        totals: list[torch.Tensor] = []
        for first_sample, batch in micro_batches:
            seed_dropout(self.config.training.seed, first_sample)
            tokens = torch.from_numpy(batch).to(self.device, non_blocking=True)
            output = self.deepspeed(tokens[:, :-1], tokens[:, 1:])
            self.deepspeed.backward(output.loss + output.regulariser)
            totals.append(_flatten(output))
            norm = self._unclipped_norm()
            self.deepspeed.step()
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
        mean = torch.stack(totals).double().mean(0).cpu()
        skipped = float(self.deepspeed.skipped_steps > skipped_before)
        values = self.mean_over_ranks([*mean.tolist(), float(norm or 0.0), skipped, float(stop)])
        return _unflatten(values, self.config.model.num_layers)

    def evaluate(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
        """Summed cross-entropy (nats) and number of targets (those not -100) of this rank's ``(n, T)`` windows."""
        self.deepspeed.eval()
        with torch.no_grad():
            output = self.deepspeed(torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device))
        return output.token_losses.double().sum().item(), int((targets != -100).sum())

    def mean_over_ranks(self, values: list[float]) -> list[float]:
        """Mean of each value over the data-parallel ranks, in float64."""
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed, group=self.control)
        return (summed / self.topology.data_size).tolist()

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Sum of each value over the data-parallel ranks, in float64."""
        return [value * self.topology.data_size for value in self.mean_over_ranks(values)]

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def _unclipped_norm(self) -> float | None:
        """Gradient norm before clipping where DeepSpeed does not tell it (ZeRO 0); gradients are reduced by now."""
        if self.config.parallel.zero_stage or not self.deepspeed.is_gradient_accumulation_boundary():
            return None
        gradients = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients).item()


def allow_fp16_on_cpu() -> None:
    """Let DeepSpeed run fp16 on a CPU without fp16 instructions: slowly, but a config can be tried before the GPUs."""
    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float32, torch.bfloat16, torch.float16]


def seed_dropout(seed: int, first_sample: int) -> None:
    """Key the dropout of a micro-batch by its first sample's number in the run.

    Masks are then a pure function of the position in the data: they do not depend on the number of data-parallel
    ranks or accumulation steps, and a resumed run needs no saved generator state.
    """
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + first_sample) % 2**63)


def _flatten(output: ModelOutput) -> torch.Tensor:
    """Loss, regulariser and statistics as one fp32 vector on the model's device, to be read once a step."""
    s = output.statistics
    parts = (output.loss, output.regulariser, s.gate, s.attention_share, s.rbf_share, s.entropy)
    return torch.cat([part.detach().float().reshape(-1) for part in parts])


def _unflatten(values: list[float], layers: int) -> StepResult:
    (loss, regulariser, gate), values = values[:3], values[3:]
    attention_share, rbf_share, entropy = (values[i * layers : (i + 1) * layers] for i in range(3))
    norm, skipped, stop = values[3 * layers :]
    return StepResult(
        loss=loss,
        regulariser=regulariser,
        gradient_norm=norm,
        skipped=skipped > 0,
        stop=stop > 0,
        attention_share=attention_share,
        rbf_share=rbf_share,
        entropy=entropy,
        gate=gate,
    )
