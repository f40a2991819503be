"""``--dry-run``: what a run would be, without building a weight."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megachiar.config import RunConfig
from megachiar.data.files import idx_path
from megachiar.errors import UserError
from megachiar.model import build_model
from megachiar.model.flops import training_flops_per_token
from megachiar.topology import data_parallel_size
from megachiar.training.sources import open_data

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank: weights and what training keeps beside them. Without allocator overhead and buffers.

    Attributes:
        parameters: weights in the compute type.
        gradients: of the weights, and their fp32 sums where the compute type is smaller.
        optimizer: fp32 master weights (where the compute type is smaller) and AdamW's two moments.
        activations: kept by the forward pass of one micro-batch for its backward pass.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations


def estimate_memory(config: RunConfig, parameters: int, data_size: int, attention_share: float) -> MemoryEstimate:
    """Memory of one rank.

    Args:
        config: of the run.
        parameters: of the whole model.
        data_size: data-parallel ranks that ZeRO shards over.
        attention_share: of the routed layers' tokens.
    """
    parallel, width = config.parallel, _BYTES[config.precision.compute]
    own = parameters / (parallel.pipeline_size * parallel.tensor_size)
    shard = {stage: 1 if parallel.zero_stage < stage else data_size for stage in (1, 2, 3)}
    mixed = config.precision.compute != "fp32"
    summed = _BYTES[config.precision.gradient_accumulation] if mixed else 0
    return MemoryEstimate(
        parameters=own * width / shard[3],
        gradients=own * (width + summed) / shard[2],
        optimizer=own * (8 + (4 if mixed else 0)) / shard[1],
        activations=activation_bytes(config, attention_share),
    )


def activation_bytes(config: RunConfig, attention_share: float) -> float:
    """Bytes that one micro-batch's forward pass keeps for the backward pass on one rank."""
    from megachiar.model.flops import activation_values_per_token

    tokens = config.training.micro_batch_size * config.sequence_length
    parallel = config.parallel
    values = activation_values_per_token(config.model, attention_share)
    # 1F1B keeps up to pipeline_size micro-batches of its own layers: as much as one of all layers.
    return tokens * values * _BYTES[config.precision.compute] / parallel.tensor_size


def expected_attention_share(config: RunConfig) -> float:
    """Share of a routed layer's tokens that take attention, for planning: as configured, else one half."""
    router = config.model.router
    return router.attention_share if router.kind == "random" else 0.5


def print_plan(config: RunConfig, world_size: int | None) -> None:
    """Print the resolved config on standard output and the plan after it."""
    ranks = world_size or _planned_ranks(config)
    data_size = data_parallel_size(config, ranks)
    sys.stdout.write(config.to_yaml())
    sys.stdout.flush()
    model = build_model(config.model, seed=0, device="meta")
    count, share = model.parameter_count(), expected_attention_share(config)
    memory = estimate_memory(config, count, data_size, share)
    table = Table(title=f"plan of {config.logging.folder}", show_header=False, title_justify="left")
    for name, value in _rows(config, ranks, data_size, count, share, memory):
        table.add_row(name, value)
    console = Console(width=110)
    console.print(table)
    console.print(_data_note(config))


def _rows(
    config: RunConfig, ranks: int, data_size: int, count: int, share: float, memory: MemoryEstimate
) -> list[tuple[str, str]]:
    training, parallel = config.training, config.parallel
    tokens = training.global_batch_size * config.sequence_length
    per_token = training_flops_per_token(config.model, config.sequence_length, _mean_share(config, share))
    dense = config.model.model_copy(update={"kind": "baseline"})
    baseline = training_flops_per_token(dense, config.sequence_length, 1.0)
    layout = f"pp {parallel.pipeline_size} x tp {parallel.tensor_size} x dp {data_size} = {ranks} ranks"
    accumulation = training.global_batch_size // (training.micro_batch_size * data_size)
    return [
        ("parameters", f"{count:,}"),
        ("layout", f"{layout}, ZeRO {parallel.zero_stage}, {config.precision.compute}"),
        ("tokens a step", f"{tokens:,} ({accumulation} micro-batches of {training.micro_batch_size} on each replica)"),
        ("tokens in all", f"{tokens * training.steps:,} in {training.steps:,} steps"),
        ("FLOPs a step", f"{per_token * tokens:.3e} at attention share {share:.2f} of routed layers"),
        ("  against all attention", f"{per_token / baseline:.1%} of {baseline * tokens:.3e}"),
        ("memory a rank", f"{_gib(memory.total)} (estimate, without buffers)"),
        ("  parameters", _gib(memory.parameters)),
        ("  gradients", _gib(memory.gradients)),
        ("  optimizer", _gib(memory.optimizer)),
        ("  activations", f"{_gib(memory.activations)} for one micro-batch"),
    ]


def _mean_share(config: RunConfig, routed_share: float) -> float:
    """Attention share over all layers when the routed ones have ``routed_share``."""
    model = config.model
    if model.kind == "baseline":
        return 1.0
    return (len(model.routed_layers) * routed_share + 1) / model.num_layers


def _planned_ranks(config: RunConfig) -> int:
    """The ranks that are started, or those that the config asks for."""
    parallel = config.parallel
    replica = parallel.pipeline_size * parallel.tensor_size
    started = int(os.environ.get("WORLD_SIZE", "1"))
    return started if started > 1 else replica * (parallel.data_size or 1)


def _data_note(config: RunConfig) -> str:
    """What the datasets say, if they are here: a plan is often made on another machine."""
    prefixes = [source.path for source in config.data.train] + list(config.data.validation.values())
    missing = [prefix for prefix in prefixes if not Path(idx_path(prefix)).exists()]
    if missing:
        return f"not checked, since not on this machine: {', '.join(map(str, missing))}"
    try:
        data = open_data(config)
    except UserError as error:
        raise UserError(error.where, error.problem, error.remedy) from None
    samples = config.training.steps * config.training.global_batch_size
    uses = data.training.describe(samples)
    return "\n".join(f"{u.prefix}: {u.tokens:,} tokens, {u.share:.1%} of samples, {u.epochs:.2f} epochs" for u in uses)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**28 else f"{size / 2**20:,.1f} MiB"
