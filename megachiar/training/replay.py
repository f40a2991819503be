"""Repeat a step of a run in one process on the CPU, with every module watched.

    RUN/checkpoints: the newest one before the step -> the steps in between -> the step, watched (module_trace.py)

The layout is no part of a run's result, so that one process repeats what any number of ranks did: the same samples, in
the same micro-batches, with the same dropout masks. A GPU rounds otherwise; what it computed wrongly does not repeat.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megachiar.checkpoint.format import complete_checkpoints, read_state
from megachiar.checkpoint.reading import locate_checkpoint
from megachiar.checkpoint.verify import verify_alone
from megachiar.config import RunConfig, load_config
from megachiar.config.sections import ParallelConfig
from megachiar.engine.deepspeed_patches import loss_scale
from megachiar.engine.engine import Engine, start_process_group
from megachiar.engine.step_metrics import StepResult
from megachiar.errors import UserError
from megachiar.topology import build_topology
from megachiar.training.bad_steps import BadSteps
from megachiar.training.continuation import Continuation, continue_run, open_run
from megachiar.training.incident_record import INCIDENT_FILE, checkpoint_of, incidents_folder
from megachiar.training.incidents import read_history
from megachiar.training.module_trace import BadModule, ModuleTrace
from megachiar.training.restore import restore
from megachiar.training.rollback_record import read_rollback
from megachiar.training.run_data import RunData
from megachiar.training.schedule import learning_rate
from megachiar.training.start import Start


@dataclass(frozen=True)
class LayerNorms:
    """L2 norms of one layer in a step: of its outputs, and of the gradients of its outputs."""

    name: str
    output: float
    gradient: float


@dataclass(frozen=True)
class Replay:
    """A repeated step.

    Attributes:
        step: its number.
        checkpoint: what it was repeated from; None for the beginning of the run.
        incident: the record that config and data were taken from; None where the run recorded none.
        result: numbers of the step.
        learning_rate: of the step.
        layers: norms of embedding, layers and last norm.
        first_bad: the first module that is not finite; None where all are.
        samples: positions in the run of the micro-batch in which it was found.
    """

    step: int
    checkpoint: Path | None
    incident: Path | None
    result: StepResult
    learning_rate: float
    layers: list[LayerNorms]
    first_bad: BadModule | None
    samples: range | None


def replay(run: Path, step: int, log: Callable[[str], None]) -> Replay:
    """Repeat ``step`` of the run in folder ``run``.

    This process must be able to train: ``launch.prepare_environment`` was called, and no GPU is visible.

    Args:
        run: the run folder.
        step: counted from 1.
        log: prints a line about what is done.

    Raises:
        UserError: there is no such run, or its data is gone.
    """
    incident = find_incident(run, step)
    config, data = open_run(single_process(_config_of(run, incident)))
    complete = complete_checkpoints(run / "checkpoints")
    origin = continue_run(config, data, _start_before(config, complete, step))
    if line := _describe_missing(run, incident, origin):
        log(line)
    data = _data_of(data, run, incident, complete, origin)
    topology = build_topology(config)
    device = start_process_group(config, topology)
    try:
        engine = Engine(config, topology.with_groups(), device)
        restore(engine, origin, lambda line: None)
        done, path = origin.progress.step, origin.start.path
        log(f"from {path or 'the beginning of the run'}: steps {done + 1} to {step}")
        judge = BadSteps(config, origin.progress.recent)
        for number in range(done + 1, step):
            rate = learning_rate(config, number)
            result = engine.train_step(_batches(engine, data, number), rate, False, judge.accepts)
            judge.judge(number, result, at_least_scale=False, newest=path)
            log(f"step {number}: {_brief(result)}")
        return _watch(engine, data, step, path, incident)
    finally:
        dist.destroy_process_group()


def find_incident(run: Path, step: int) -> Path | None:
    """Return the newest incident of ``step``; None if the run recorded none."""
    name = re.compile(rf"step_{step:08d}(?:_(\d{{1,9}}))?")
    found = {
        path: int(match[1] or 1)
        for path in incidents_folder(run).glob("step_*")
        if (match := name.fullmatch(path.name)) and (path / INCIDENT_FILE).exists()
    }
    return max(found, key=found.__getitem__, default=None)


def single_process(config: RunConfig) -> RunConfig:
    """Return the config of a run that trains the same on one process, without what hides a module's numbers."""
    return config.model_copy(
        update={
            "parallel": ParallelConfig(zero_stage=0 if config.precision.compute == "fp32" else 1),
            "precision": config.precision.model_copy(update={"kernels": "auto"}),
            "training": config.training.model_copy(update={"activation_checkpoint_interval": None, "compile": None}),
            "optimizer": config.optimizer.model_copy(update={"implementation": "torch"}),
            "deepspeed": {},
        }
    )


def _config_of(run: Path, incident: Path | None) -> RunConfig:
    """Return the config that the step was taken with: the incident's, or else the run's newest."""
    if not (run / "config.yaml").is_file():
        raise UserError(run, "is no run folder: it has no config.yaml", "give logging.folder of the run's config")
    return load_config((run if incident is None else incident) / "config.yaml")


def _start_before(config: RunConfig, complete: list[Path], step: int) -> Start:
    """Return what the steps are repeated from: the newest checkpoint before ``step``, or what the run started from."""
    before = [path for path in reversed(complete) if read_state(path).step < step]
    whole = next((path for path in before if verify_alone(path) is None), None)
    if whole is not None:
        return Start("resumed", whole, read_state(whole).step)
    if config.checkpoint.load_from is None:
        return Start("fresh")
    other = locate_checkpoint(config.checkpoint.load_from)
    return Start(config.checkpoint.load, other, read_state(other).step if config.checkpoint.load == "all" else 0)


def _describe_missing(run: Path, incident: Path | None, origin: Continuation) -> str | None:
    """Return a line for the log where the checkpoint before the incident is gone; None where it is there."""
    name = checkpoint_of(incident) if incident is not None else None
    path = origin.start.path
    if name is None or (path is not None and path.name == name):
        return None
    return (
        f"{run / 'checkpoints' / name}, the checkpoint before the incident, is gone or damaged, so that more steps are "
        "repeated. A run keeps that of its newest incident; checkpoint.keep and keep_every keep more"
    )


def _data_of(data: RunData, run: Path, incident: Path | None, complete: list[Path], origin: Continuation) -> RunData:
    """Return the data as the step has read it: for an incident, with the samples that a rollback left out later."""
    if incident is not None:
        return data.with_history(read_history(incident))
    if not complete:
        return origin.data
    newest, rollback = read_state(complete[-1]), read_rollback(run, complete[-1])
    return data.continue_from(newest.data, newest.step, rollback.data if rollback is not None else None)


def _batches(engine: Engine, data: RunData, step: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the micro-batches of a step, those of all replicas one after another."""
    size = engine.config.training.micro_batch_size
    positions = data.history.samples_of(step)
    for first in range(positions.start, positions.stop, size):
        yield first, data.training.batch(range(first, first + size))


def _watch(engine: Engine, data: RunData, step: int, checkpoint: Path | None, incident: Path | None) -> Replay:
    """Take ``step`` with every module watched."""
    model = engine.deepspeed.module
    rate = learning_rate(engine.config, step)
    with ModuleTrace(model, loss_scale(engine.deepspeed)) as trace:
        result = engine.train_step(_batches(engine, data, step), rate)
    names = ["embedding", *(f"layers.{index}" for index in range(len(model.layers))), "norm"]
    samples = None
    if trace.first_bad is not None:
        size = engine.config.training.micro_batch_size
        first = data.history.samples_of(step).start + trace.first_bad.micro_batch * size
        samples = range(first, first + size)
    return Replay(
        step=step,
        checkpoint=checkpoint,
        incident=incident,
        result=result,
        learning_rate=rate,
        layers=[LayerNorms(name, trace.output_norm(name), trace.gradient_norm(name)) for name in names],
        first_bad=trace.first_bad,
        samples=samples,
    )


def _brief(result: StepResult) -> str:
    skipped = ", left out" if result.skipped else ""
    return f"loss {result.loss:.4f}, gradient norm {result.gradient_norm:.4f}{skipped}"
