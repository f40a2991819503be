"""Measure on one rank, under each layout, the bytes of all tensors that are alive as the optimizer steps.

    python memory_worker.py CONFIG OUTPUT_FOLDER JSON      JSON: {name: overrides}

``tests/planning/test_rank_plan.py`` starts it.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.utils import groups

from megachiar import launch
from megachiar.config import load_config
from megachiar.data.sampling.loader import BatchLoader
from megachiar.engine.engine import Engine, start_process_group
from megachiar.engine.muon import MuonAdamW
from megachiar.topology import build_topology
from megachiar.training.run_data import open_data


def main() -> None:
    config_path, output, cases = sys.argv[1:]
    launch.prepare_environment()
    launch.configure_torch(1)
    for name, sets in json.loads(cases).items():
        config = load_config(config_path, sets)
        topology = build_topology(config)
        device = torch.device("cpu") if dist.is_initialized() else start_process_group(config, topology)
        groups.mpu = None
        gc.collect()
        before = tensor_bytes()
        alive: list[int] = []
        for optimizer in (torch.optim.AdamW, MuonAdamW):  # before the engine takes it
            optimizer.step = watched(optimizer.step, alive)
        engine = Engine(config, topology.with_groups(), device)
        data, micro = open_data(config), config.training.micro_batch_size
        with BatchLoader(
            data.training, micro, engine.accumulation_steps, topology.data_rank, topology.data_size
        ) as loader:
            for _ in range(2):
                engine.train_step(((loader.position, next(loader)) for _ in range(engine.accumulation_steps)), 1e-3)
        all_ranks: list = [None] * topology.world_size
        dist.all_gather_object(all_ranks, max(alive) - before)
        if topology.is_main:
            Path(output, f"{name}.json").write_text(json.dumps(all_ranks))
        del engine
    dist.destroy_process_group()


def watched(step, alive: list[int]):
    """Return ``step`` as a function that first appends the bytes of all tensors to ``alive``."""
    step = getattr(step, "unwatched", step)

    def watched_step(*arguments, **options):
        alive.append(tensor_bytes())
        return step(*arguments, **options)

    watched_step.unwatched = step
    return watched_step


def tensor_bytes() -> int:
    """Return the bytes of all tensors on the CPU that Python can reach, each storage counted once."""
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, torch.Tensor) and found.device.type == "cpu":
            for tensor in (found, found.grad) if found.is_leaf else (found,):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    main()
