"""Train one config under several layouts on one rank, with all its tasks, and record losses and parameters.

    python tasks_worker.py CONFIG OUTPUT_FOLDER JSON

JSON: {layout's name: overrides of the config}. ``tests/engine/test_tasks.py`` starts it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import groups

sys.path.insert(0, str(Path(__file__).parent))
from layouts_worker import gather_parameters

from megachiar import launch
from megachiar.config import RunConfig, load_config
from megachiar.data.sampling.examples import ExampleSet
from megachiar.engine.engine import Engine, start_process_group
from megachiar.topology import Topology, build_topology
from megachiar.training.classification import evaluate_examples
from megachiar.training.evaluation import evaluate
from megachiar.training.run_data import open_data
from megachiar.training.schedule import learning_rate
from megachiar.training.step_batches import StepBatches


def main() -> None:
    config_path, output, layouts = sys.argv[1:]
    launch.prepare_environment()
    launch.configure_torch(1)
    for name, overrides in json.loads(layouts).items():
        config = load_config(config_path, overrides)
        topology = build_topology(config)
        device = torch.device("cpu") if dist.is_initialized() else start_process_group(config, topology)
        groups.mpu = None  # DeepSpeed keeps that of the last layout
        recording = train(config, topology.with_groups(), device)
        if topology.is_main:
            Path(output).mkdir(parents=True, exist_ok=True)
            np.savez(Path(output) / f"{name}.npz", **recording)
    dist.destroy_process_group()


def train(config: RunConfig, topology: Topology, device: torch.device) -> dict[str, np.ndarray]:
    """Train all steps; return losses and gradient norms by step, the evaluations and the last parameters."""
    data = open_data(config)
    engine = Engine(config, topology, device)
    results = []
    with StepBatches(config, topology, data, 0, pin_memory=False) as batches:
        for step in range(1, config.steps + 1):
            plan = batches.plan()
            read = batches.read(plan, lambda number, sample: None, lambda number, batch: None)
            results.append(engine.train_step(read, learning_rate(config, step), plan=plan))
    evaluations = {f"evaluation {name}": measure(engine, dataset) for name, dataset in data.validation.items()}
    tasks = {
        f"{name} {key}": np.array([getattr(r.tasks[name], key) if name in r.tasks else np.nan for r in results])
        for name in config.mixed.tasks
        for key in ("loss", "gate")
    }
    return {
        "loss": np.array([r.loss for r in results]),
        "regulariser": np.array([r.regulariser for r in results]),
        "gradient_norm": np.array([r.gradient_norm for r in results]),
        "attention_share": np.array([r.attention_share for r in results]),
        "entropy": np.array([r.entropy for r in results]),
        "gate": np.array([r.gate for r in results]),
        **tasks,
        **evaluations,
        **{f"parameter {name}": value for name, value in gather_parameters(engine, topology).items()},
    }


def measure(engine: Engine, dataset) -> np.ndarray:
    """Return the loss on a validation set, and for a labelled one accuracy and macro-F1."""
    topology, micro = engine.topology, engine.config.training.micro_batch_size
    ranks = {"rank": topology.data_rank, "ranks": topology.data_size, "reduce_sum": engine.sum_over_world}
    if isinstance(dataset, ExampleSet):
        result = evaluate_examples(engine.classify, dataset, micro, **ranks)
        return np.array([result.loss, result.accuracy, result.macro_f1])
    return np.array([evaluate(engine.evaluate, dataset, micro, **ranks).loss])


if __name__ == "__main__":
    main()
