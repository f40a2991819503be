"""Train one step under several layouts on one rank, alter tensors on single ranks, and record what the comparison says.

    python compare_ranks_worker.py CONFIG OUTPUT JSON

JSON: {layout's name: {"set": overrides, "alter": [[rank, start of a tensor's name], ...]}}

``tests/training/test_compare_ranks.py`` starts it.
"""

from __future__ import annotations

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
from megachiar.engine.weight_digests import held_tensors
from megachiar.topology import LaunchError, build_topology
from megachiar.training.compare_ranks import compare_ranks
from megachiar.training.run_data import open_data

SAMPLES = 77


def main() -> None:
    config_path, output, layouts = sys.argv[1:]
    launch.prepare_environment()
    launch.configure_torch(1)
    report = {}
    for name, layout in json.loads(layouts).items():
        config = load_config(config_path, layout["set"])
        topology = build_topology(config)
        if not dist.is_initialized():
            start_process_group(config, topology)
        groups.mpu = None  # DeepSpeed keeps that of the last layout
        engine = Engine(config, topology.with_groups(), torch.device("cpu"))
        unread = verdict(engine, 0)
        train_one_step(engine)
        report[name] = {
            "before the first step": unread,
            "names": sorted(tensor.name for tensor in held_tensors(engine)),
            "unaltered": verdict(engine, SAMPLES),
            "altered": [altered(engine, rank, start) for rank, start in layout["alter"]],
            "restored": verdict(engine, SAMPLES),
            "other samples": verdict(engine, SAMPLES + (topology.rank == 1)),
        }
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, report)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(everyone))
    dist.destroy_process_group()


def train_one_step(engine: Engine) -> None:
    config, topology = engine.config, engine.topology
    micro = config.training.micro_batch_size
    data = open_data(config)
    with BatchLoader(data.training, micro, engine.accumulation_steps, topology.data_rank, topology.data_size) as loader:
        engine.train_step(
            ((loader.position + topology.data_rank * micro, next(loader)) for _ in range(engine.accumulation_steps)),
            learning_rate=1e-3,
        )


def verdict(engine: Engine, samples: int) -> str | None:
    """Return the message of the comparison; None where all ranks agree."""
    try:
        compare_ranks(engine, 1, samples)
    except LaunchError as error:
        return str(error)
    return None


def altered(engine: Engine, rank: int, start: str) -> str | None:
    """Flip the lowest bit of one element of a tensor on ``rank``, and return the comparison's message."""
    if engine.topology.rank == rank:
        flip_bit(engine, start)
    message = verdict(engine, SAMPLES)
    if engine.topology.rank == rank:
        flip_bit(engine, start)
    return message


def flip_bit(engine: Engine, start: str) -> None:
    value = next(tensor.value for tensor in held_tensors(engine) if tensor.name.startswith(start))
    flat = value.view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()])
    flat[len(flat) // 2] ^= 1


if __name__ == "__main__":
    main()
