"""One rank of ``test_training_layouts.py``: train the same config under several ZeRO stages and record everything.

python layouts_worker.py CONFIG OUTPUT_FOLDER STAGE...
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megachiar import launch
from megachiar.config import RunConfig, load_config
from megachiar.data.loader import BatchLoader
from megachiar.model import build_model
from megachiar.model.router import Router
from megachiar.topology import Topology, build_topology
from megachiar.training.engine import Engine, start_process_group
from megachiar.training.evaluation import evaluate
from megachiar.training.schedule import learning_rate
from megachiar.training.sources import open_data


def main() -> None:
    config_path, output, *stages = sys.argv[1:]
    launch.prepare_environment()
    for stage in stages:
        config = load_config(config_path, [f"parallel.zero_stage={stage}"])
        topology = build_topology(config)
        launch.configure_torch(1)
        device = torch.device("cpu") if dist.is_initialized() else start_process_group(config, topology)
        recording = train(config, topology, device)
        if topology.is_main:
            Path(output).mkdir(parents=True, exist_ok=True)
            np.savez(Path(output) / f"stage{stage}.npz", **recording)
    dist.destroy_process_group()


def train(config: RunConfig, topology: Topology, device: torch.device) -> dict[str, np.ndarray]:
    """Losses, gradient norms and evaluation of a run, and the route of each token at each step."""
    data = open_data(config)
    engine = Engine(config, topology, build_model(config.model, seed=config.training.seed), device)
    decisions: list[tuple[np.ndarray, np.ndarray]] = []
    for module in engine.deepspeed.module.modules():
        if isinstance(module, Router):
            module.register_forward_hook(
                lambda router, _, decision: (
                    decisions.append(
                        (decision.operator.numpy().copy(), (decision.entropy - router.bounds[0]).abs().numpy().copy())
                    )
                    if router.training
                    else None
                )
            )
    training, micro = config.training, config.training.micro_batch_size
    results = []
    loader = BatchLoader(data.training, micro, engine.accumulation_steps, topology.data_rank, topology.data_size)
    with loader:
        for step in range(training.steps):
            batches = (
                (loader.position + topology.data_rank * micro, next(loader)) for _ in range(engine.accumulation_steps)
            )
            results.append(engine.train_step(batches, learning_rate(config, step)))
    evaluation = [
        evaluate(
            engine.evaluate,
            dataset,
            3,
            rank=topology.data_rank,
            ranks=topology.data_size,
            reduce_sum=engine.sum_over_ranks,
        ).loss
        for dataset in data.validation.values()
    ]
    routes, margins = routes_of_all(decisions, config, engine, topology)
    return {
        "loss": np.array([r.loss for r in results]),
        "gradient_norm": np.array([r.gradient_norm for r in results]),
        "attention_share": np.array([r.attention_share for r in results]),
        "evaluation": np.array(evaluation),
        "routes": routes,
        "margin": margins,
    }


def routes_of_all(
    decisions: list[tuple[np.ndarray, np.ndarray]], config: RunConfig, engine: Engine, topology: Topology
) -> tuple[np.ndarray, np.ndarray]:
    """Operator and |H - tau| of every token, (steps, routed layers, tokens of a step), in the order of the data."""
    layers = len(config.model.routed_layers)
    if not layers:
        return np.zeros((0, 0, 0), np.int64), np.zeros((0, 0, 0), np.float32)
    everyone: list = [None] * topology.world_size
    dist.all_gather_object(everyone, decisions)
    shape = (config.training.steps, engine.accumulation_steps, layers, -1)

    def joined(part: int) -> np.ndarray:
        # (steps, micro-steps, ranks, layers, tokens): micro-steps and ranks are the order of the samples.
        stacked = np.stack([np.stack([d[part] for d in own]).reshape(shape) for own in everyone], axis=2)
        return stacked.transpose(0, 3, 1, 2, 4).reshape(shape[0], layers, -1)

    return joined(0), joined(1)


if __name__ == "__main__":
    main()
