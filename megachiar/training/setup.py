"""From a checked config to a finished run, in the order things happen."""

from __future__ import annotations

import torch
import torch.distributed as dist
from rich.console import Console

from megachiar.config import RunConfig
from megachiar.data.files import write_atomically
from megachiar.launch import StopSignals
from megachiar.topology import Topology
from megachiar.training.checkpoint import find_checkpoint, load_weights, whole_checkpoints
from megachiar.training.engine import Engine, start_process_group
from megachiar.training.loop import Progress, Trainer, resume_if_possible
from megachiar.training.metrics import Display, MetricsWriter
from megachiar.training.sources import RunData, keep_tokenizer, open_data


def pretrain(config: RunConfig, topology: Topology, signals: StopSignals, console: Console) -> int:
    """Train as ``config`` says; returns the exit code of the process."""
    data = open_data(config)
    device = start_process_group(config, topology)
    try:
        topology = topology.with_groups()
        engine = Engine(config, topology, device)
        introduce(config, engine, data, console)
        progress = resume_if_possible(engine, data, console.print)
        display = Display(console, config.training.steps, progress.step)
        if progress.step >= config.training.steps:
            console.print(
                f"nothing to do: {config.logging.folder} is at step {progress.step} of {config.training.steps}"
            )
            return 0
        writer = open_run_folder(config, data, progress) if topology.is_main else None
        try:
            return Trainer(engine, data, progress, writer, display, signals).run()
        finally:
            if writer is not None:
                writer.close()
    finally:
        signals.ignore()
        if dist.is_initialized():
            dist.destroy_process_group()


def starting_model(config: RunConfig, console: Console) -> ChiarFormer:
    """A model with initial weights, or those of ``checkpoint.load_from`` for a run that has no checkpoint yet."""
    model = build_model(config.model, seed=config.training.seed)
    source = config.checkpoint.load_from
    if source is not None and not whole_checkpoints(config.checkpoint_folder):
        checkpoint = find_checkpoint(source)
        load_weights(checkpoint, model)
        console.print(f"weights from {checkpoint}; optimizer, schedule and data start anew")
    return model


def open_run_folder(config: RunConfig, data: RunData, progress: Progress) -> MetricsWriter:
    """Write the resolved config and the tokenizer, and open the metrics."""
    folder = config.logging.folder
    write_atomically(folder / "config.yaml", config.to_yaml().encode())
    keep_tokenizer(data.tokenizer, folder / "tokenizer")
    return MetricsWriter(folder, config.logging.tensorboard, progress.step)


def introduce(config: RunConfig, engine: Engine, data: RunData, console: Console) -> None:
    """The first lines of the log: what runs, on what, from what."""
    topology, training = engine.topology, config.training
    count = sum(getattr(p, "ds_numel", p.numel()) for p in engine.deepspeed.module.parameters())
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"
    console.print(f"[bold]megachiar[/] {config.model.kind}, {count:,} parameters, run folder {config.logging.folder}")
    console.print(
        f"{topology.world_size} x {device} ({torch.get_num_threads()} threads), data parallel {topology.data_size}, "
        f"ZeRO {config.parallel.zero_stage}, {config.precision.compute}, optimizer: {engine.optimizer_implementation}"
    )
    tokens = training.global_batch_size * config.sequence_length
    console.print(
        f"{training.steps:,} steps of {training.global_batch_size} x {config.sequence_length} = {tokens:,} tokens "
        f"(micro-batch {training.micro_batch_size}, accumulation {engine.accumulation_steps})"
    )
    for use in data.training.describe(training.steps * training.global_batch_size):
        console.print(f"  {use.prefix}: {use.tokens:,} tokens, {use.share:.1%} of samples, {use.epochs:.2f} epochs")
    if data.tokenizer is None:
        console.print(
            "[yellow]  no tokenizer is known (no manifest, no data.tokenizer): the run cannot be sampled from[/]"
        )
