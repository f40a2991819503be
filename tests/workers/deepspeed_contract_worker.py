"""Set up real engines on one rank and print, as JSON, which attributes of ``PRIVATE_ATTRIBUTES`` they lack.

The timeouts of all process groups are printed as well, in seconds.

    python deepspeed_contract_worker.py CONFIG ...        one config after another

``tests/engine/test_deepspeed_patches.py`` starts it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from megachiar import launch

launch.prepare_environment()
launch.configure_torch(1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.pipe import LayerSpec  # noqa: E402
from torch.distributed.distributed_c10d import _world  # noqa: E402

from megachiar.config import load_config  # noqa: E402
from megachiar.engine import deepspeed_patches  # noqa: E402
from megachiar.engine.engine import Engine, start_process_group  # noqa: E402
from megachiar.engine.pipeline import PipelineReplica  # noqa: E402
from megachiar.engine.step_clock import StepClock  # noqa: E402
from megachiar.topology import build_topology  # noqa: E402


def holders(engine: Engine) -> Iterator[tuple[str, object]]:
    """Yield each object of this engine whose kind stands in ``PRIVATE_ATTRIBUTES``, after the name of its kind."""
    zero_stage = engine.config.parallel.zero_stage
    optimizer = engine.deepspeed.optimizer
    parameters = [parameter for _, parameter in engine.named_parameters()]
    yield "engine", engine.deepspeed
    if engine.deepspeed.fp16_enabled():
        yield "fp16 optimizer", optimizer
        yield "fp16 loss scaler", optimizer.loss_scaler
    if zero_stage in (1, 2):
        yield "ZeRO 1 and 2 optimizer", optimizer
        yield "ZeRO 1 and 2 parameter", parameters[0]
        yield "ZeRO 1 and 2 mapping", parameters[0]._hp_mapping
    if zero_stage == 3:
        yield "ZeRO 3 optimizer", optimizer
        yield "ZeRO 3 parameter", parameters[0]


def main() -> None:
    lacking, seen, timeouts = [], set(), set()
    for path in sys.argv[1:]:
        config = load_config(Path(path), [])
        topology = build_topology(config)
        device = torch.device("cpu") if dist.is_initialized() else start_process_group(config, topology)
        engine = Engine(config, topology.with_groups(), device)
        found = list(holders(engine))
        if "pipeline" not in seen:
            ranks = deepspeed_patches.pipeline_topology(1, 1, 1)
            pipeline = deepspeed_patches.BoundedPipeline([LayerSpec(torch.nn.Identity)], [0, 1], ranks, sum)
            found.append(("pipeline", pipeline))
        if "pipeline engine" not in seen and config.parallel.zero_stage == 1:
            found.append(
                ("pipeline engine", PipelineReplica(config, topology.with_groups(), device, StepClock()).deepspeed)
            )
        for kind, holder in found:
            seen.add(kind)
            lacking += [f"{kind}.{name}" for name in _names(kind) if not hasattr(holder, name)]
        timeouts |= {group._get_backend(device).options._timeout.total_seconds() for group in _world.pg_map}
    print(json.dumps({"lacking": sorted(set(lacking)), "seen": sorted(seen), "timeouts": sorted(timeouts)}))
    dist.destroy_process_group()


def _names(kind: str) -> tuple[str, ...]:
    return deepspeed_patches.PRIVATE_ATTRIBUTES[kind]


if __name__ == "__main__":
    main()
