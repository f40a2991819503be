"""Train and evaluate on one rank, and print as JSON where the host reads a tensor, which on a GPU makes it wait.

    python host_reads_worker.py CONFIG JSON

JSON: {name: overrides of the config}. Printed: {name: [reads of each step, reads of each evaluation]}, each {place: how
often}. A place is the innermost function of megachiar or DeepSpeed. The model's own operators are left out, since on a
CPU they are others than on a GPU. So are reductions over ranks: their vector is in the host's memory on GPUs too.

``tests/engine/test_host_copies.py`` starts it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megachiar import launch
from megachiar.config import load_config
from megachiar.engine.engine import Engine, start_process_group
from megachiar.engine.micro_batches import MicroStep
from megachiar.topology import build_topology
from megachiar.training.run_data import open_data
from megachiar.training.step_batches import StepBatches
from megachiar.training.validation import evaluate_set

LEFT_OUT = ("megachiar/model/", "megachiar/kernels/", "megachiar/parallel/", "sum_over_world")


class Reads(TorchDispatchMode):
    """Counts reads while it is entered: of single numbers, lists, arrays, and copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        named = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy", "cpu")}
        self._patches = [mock.patch.object(torch.Tensor, name, self._counted(read)) for name, read in named.items()]

    def _counted(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            self._count()
            return read(*arguments, **keywords)

        return counted

    def _count(self) -> None:
        frame: Any = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            for package in ("megachiar", "deepspeed"):
                _, found, inside = code.co_filename.rpartition(f"/{package}/")
                if found and "/tests/" not in code.co_filename:
                    place = f"{package}/{inside}:{code.co_name}"
                    if not any(part in place for part in LEFT_OUT):
                        self.places[place] += 1
                    return
            frame = frame.f_back

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self._count()
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Reads:
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()


def main() -> None:
    path, wanted = sys.argv[1:]
    launch.prepare_environment()
    launch.configure_torch(1)
    printed = {}
    for name, overrides in json.loads(wanted).items():
        config = load_config(Path(path), overrides)
        topology = build_topology(config)
        device = torch.device("cpu") if dist.is_initialized() else start_process_group(config, topology)
        topology = topology.with_groups()
        engine, data = Engine(config, topology, device), open_data(config)
        steps = []
        with StepBatches(config, topology, data, 0, pin_memory=False) as batches:
            for _ in range(config.steps):
                plan: list[MicroStep] = batches.plan()
                with Reads() as reads:
                    engine.train_step(batches.read(plan, lambda *_: None, lambda *_: None), 1e-3, plan=plan)
                steps.append(reads.places)
        evaluations = []
        for dataset in data.validation.values():
            with Reads() as reads:
                evaluate_set(engine, dataset, None, lambda: False, lambda window: None)
            evaluations.append(reads.places)
        printed[name] = [steps, evaluations]
    print(json.dumps(printed))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
