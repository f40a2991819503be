"""Train several runs whose gradients, losses or weights a case makes bad, as one rank of each.

    python bad_numbers_worker.py CONFIG JSON

JSON: [{"set": overrides of the config, "poison": a case or null, "leave_out": [first, end] or null}, ...]. A case names
what is made bad, and where; with ``token`` it is made bad wherever a micro-batch holds this token. ``leave_out`` are
positions of samples that the run never reads. With ``kill`` the ranks kill themselves before a step, once the run has
gone back so often: {"step": 10, "rollbacks": 1}. With ``stop`` rank 0 gets a SIGTERM there::

    {"what": "gradient" | "loss" | "weight", "steps": [3], "ranks": [1], "value": "nan"}
    {"what": "weight", "name": "layers.1.norm.weight", "steps": [3], "ranks": [0], "value": "3e38"}    ZeRO 0 alone
    {"what": "token", "token": 63, "value": "1000"}

The runs share one process group, so that the cases of a test need one start of processes. Each ends with a line of
JSON: its exit code and its error.

``tests/training/test_bad_numbers.py`` starts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from megachiar import launch

launch.prepare_environment()
launch.configure_torch(1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.utils import groups  # noqa: E402

from megachiar.activity import Activity  # noqa: E402
from megachiar.config import load_config  # noqa: E402
from megachiar.console import make_console  # noqa: E402
from megachiar.engine.deepspeed_patches import stepped_tensors  # noqa: E402
from megachiar.engine.engine import Engine, start_process_group  # noqa: E402
from megachiar.errors import UserError  # noqa: E402
from megachiar.stop_signals import StopSignals  # noqa: E402
from megachiar.topology import Topology, build_topology  # noqa: E402
from megachiar.training import trainer  # noqa: E402
from megachiar.training.run import train  # noqa: E402
from megachiar.training.run_data import open_data  # noqa: E402
from megachiar.training.run_events import RunEvents  # noqa: E402
from megachiar.training.supervision import Supervision  # noqa: E402
from megachiar.training.watch import PeerWatch  # noqa: E402


def main() -> None:
    path, cases = sys.argv[1:]
    step_of_trainer = trainer.Trainer._step
    for case in json.loads(cases):
        step = poisoned(step_of_trainer, case["poison"]) if case["poison"] else step_of_trainer
        for name, end in (("kill", kill), ("stop", ask_to_stop)):
            step = ended(step, end, **case[name]) if name in case else step
        trainer.Trainer._step = step
        config = load_config(path, case["set"])
        topology = build_topology(config)
        device = torch.device("cpu") if dist.is_initialized() else start_process_group(config, topology)
        groups.mpu = None  # DeepSpeed keeps that of the last run
        groups_of_run, data = topology.with_groups(), open_data(config)
        if case.get("leave_out"):
            data = data.leave_out(range(*case["leave_out"]))
        try:
            code = train(config, groups_of_run, device, data, unwatched(groups_of_run), make_console())
            result = {"code": code, "error": ""}
        except UserError as error:
            result = {"code": 2, "error": str(error)}
        print(json.dumps(result), flush=True)
    dist.destroy_process_group()


def unwatched(topology: Topology) -> Supervision:
    """Return what stands beside the training loop, without the threads that watch other ranks."""
    signals, activity = StopSignals(), Activity()
    return Supervision(signals, None, PeerWatch(topology, 60.0, activity, signals), activity, RunEvents(None, print))


def poisoned(step_of_trainer: Any, case: dict[str, Any]) -> Any:
    """Return a ``Trainer._step`` that makes numbers bad in the steps and on the ranks of the case."""

    def step(self: trainer.Trainer, loader: Any) -> Any:
        if case["what"] == "token":
            with poison_token(self.engine, float(case["value"]), case["token"]):
                return step_of_trainer(self, loader)
        number, rank = self.progress.step + 1, self.engine.topology.rank
        if number not in case["steps"] or rank not in case["ranks"]:
            return step_of_trainer(self, loader)
        with POISONS[case["what"]](self.engine, float(case["value"]), case.get("name")):
            return step_of_trainer(self, loader)

    return step


def ended(step_of_trainer: Any, end: Callable[[trainer.Trainer], None], step: int, rollbacks: int) -> Any:
    """Return a ``Trainer._step`` that calls ``end`` before a step, once the run has gone back so often."""

    def end_or_step(self: trainer.Trainer, loader: Any) -> Any:
        if self.progress.step + 1 == step and self.bad_steps.rollbacks == rollbacks:
            end(self)
        return step_of_trainer(self, loader)

    return end_or_step


def kill(_: trainer.Trainer) -> None:
    """Kill this rank."""
    os.kill(os.getpid(), signal.SIGKILL)


def ask_to_stop(run: trainer.Trainer) -> None:
    """Let rank 0 know of a signal."""
    if run.engine.topology.is_main:
        run.supervision.signals.received = "SIGTERM"


@contextlib.contextmanager
def poison_gradient(engine: Engine, value: float, _: str | None) -> Iterator[None]:
    """Make one number of one parameter's gradient bad."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[-1] = value
        return spoilt

    handle = next(p for _, p in engine.named_parameters() if p.requires_grad).register_hook(spoil)
    yield
    handle.remove()


@contextlib.contextmanager
def poison_loss(engine: Engine, value: float, _: str | None) -> Iterator[None]:
    """Make the measured loss bad, and leave the gradients as they are."""
    module = engine.deepspeed.module
    if engine.topology.pipeline_size > 1:
        loss_fn = module.loss_fn

        def spoil_last(outputs: Any, targets: torch.Tensor) -> torch.Tensor:
            loss = loss_fn(outputs, targets)
            module.losses[-1] = module.losses[-1] + value
            return loss

        module.loss_fn = spoil_last
        yield
        module.loss_fn = loss_fn
        return

    def spoil(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        return output._replace(loss=output.loss + value)

    handle = module.register_forward_hook(spoil)
    yield
    handle.remove()


@contextlib.contextmanager
def poison_token(engine: Engine, value: float, token: int) -> Iterator[None]:
    """Multiply the loss of each micro-batch that holds the token."""
    module = engine.deepspeed.module
    if engine.topology.pipeline_size > 1:
        loss_fn = module.loss_fn
        module.loss_fn = lambda outputs, targets: loss_fn(outputs, targets) * (value if (targets == token).any() else 1)
        yield
        module.loss_fn = loss_fn
        return

    def spoil(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        return output._replace(loss=output.loss * value) if (inputs[0] == token).any() else output

    handle = module.register_forward_hook(spoil)
    yield
    handle.remove()


@contextlib.contextmanager
def poison_weight(engine: Engine, value: float, name: str | None) -> Iterator[None]:
    """Make a row of a weight, or one number of the optimizer's first tensor, bad after the step."""
    yield
    with torch.no_grad():
        if name is not None:
            dict(engine.named_parameters())[name][0] = value
        else:
            stepped_tensors(engine.deepspeed, engine.config.parallel.zero_stage)[0].view(-1)[0] = value


POISONS = {"gradient": poison_gradient, "loss": poison_loss, "weight": poison_weight}


if __name__ == "__main__":
    main()
