"""Repeat a step of a run in one process on the CPU, with every module watched.

    what the run had then (replay_origin.py) -> the steps in between -> the step, watched (module_trace.py)

The layout is no part of a run's result, so that one process repeats what any number of ranks did: the same samples,
with the same dropout masks. Steps that were left out are left out again. Each step is compared with what the run
recorded of it. A GPU rounds otherwise; what it computed wrongly does not repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megachiar.config import RunConfig
from megachiar.data.sampling.dataset import SampleStream
from megachiar.data.sampling.history import OrderRecord
from megachiar.data.sampling.megatron_order import MegatronStream
from megachiar.engine.deepspeed_patches import loss_scale
from megachiar.engine.engine import Engine, start_process_group
from megachiar.engine.micro_batches import MicroStep
from megachiar.engine.step_metrics import StepResult
from megachiar.errors import UserError
from megachiar.topology import build_topology
from megachiar.training.bad_steps import BadSteps
from megachiar.training.mixing import Mixing
from megachiar.training.module_trace import BadModule, ModuleTrace
from megachiar.training.recorded_steps import RecordedStep
from megachiar.training.replay_origin import Origin, find_origin
from megachiar.training.restore import restore
from megachiar.training.run_data import RunData
from megachiar.training.schedule import learning_rate


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
        config: the file that the config of the step was read from.
        incident: the record that config and data were taken from; None where the run recorded none.
        result: numbers of the step.
        learning_rate: of the step.
        recorded: the numbers that the run recorded of the step; None where it recorded none.
        difference: how the repeated step differs from them by more than rounding; empty where it does not.
        layers: norms of embedding, layers and last norm.
        first_bad: the first module that is not finite; None where all are.
        samples: positions in the run, or among the samples of an auxiliary task, of the micro-batch in which it was
            found.
        task: the name of the task that this micro-batch was for.
    """

    step: int
    checkpoint: Path | None
    config: Path
    incident: Path | None
    result: StepResult
    learning_rate: float
    recorded: RecordedStep | None
    difference: str
    layers: list[LayerNorms]
    first_bad: BadModule | None
    samples: range | None
    task: str | None


def replay(run: Path, step: int, log: Callable[[str], None], overrides: Sequence[str] = ()) -> Replay:
    """Repeat ``step`` of the run in folder ``run``.

    This process must be able to train: ``launch.prepare_environment`` was called, and no GPU is visible.

    Args:
        run: the run folder.
        step: counted from 1.
        log: prints a line about what is done.
        overrides: each ``"a.b=value"``, over the config of the step.

    Raises:
        UserError: there is no such run, or its data is gone.
    """
    origin = find_origin(run, step, overrides)
    first = origin.run.progress.step + 1
    if first > step:
        raise UserError(
            run,
            f"begins after step {first - 1}, from {origin.run.start.path}",
            f"replay step {step} in the folder of the run that took it",
        )
    samples = _Samples(origin.config, origin.data)
    _check_batches(run, origin, first, step)
    for line in origin.remarks:
        log(line)
    topology = build_topology(origin.config)
    device = start_process_group(origin.config, topology)
    try:
        engine = Engine(origin.config, topology.with_groups(), device)
        restore(engine, origin.run, lambda line: None)
        log(f"from {origin.run.start.path or 'the beginning of the run'}: steps {first} to {step}")
        log(f"with {origin.config_file}")
        judge = BadSteps(origin.config, origin.run.progress.recent)
        for number in range(first, step):
            _repeat(engine, samples, origin, judge, number, log)
        return _watch(engine, samples, step, origin)
    finally:
        dist.destroy_process_group()


class _Samples:
    """Read the micro-batches of steps that may belong to several orders of the data.

    Args:
        config: of the step that is repeated, on one process.
        data: that the run has read.
    """

    def __init__(self, config: RunConfig, data: RunData):
        self.data = data
        self.tasks = config.tasks
        self.micro_batch_size = config.training.micro_batch_size
        self._mixing = Mixing(config, data_size=1, read=data.tasks_read)
        self._order: OrderRecord | None = None
        self._stream: SampleStream | MegatronStream = data.training

    def plan(self, step: int) -> list[MicroStep]:
        """Return what the micro-batches of a step are for, those of all replicas together."""
        return self._mixing.plan(self.data.history.samples_of(step))

    def of(self, step: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the micro-batches of a step, those of all replicas one after another."""
        order = self.data.history.order_of(step)
        if order != self._order:
            self._order, self._stream = order, self.data.samples_in(order)
        streams = [self._stream, *(task.training for task in self.data.auxiliary)]
        for task, positions in self.positions(step):
            yield positions.start, streams[task].batch(positions)

    def positions(self, step: int) -> Iterator[tuple[int, range]]:
        """Yield the number of the task of each micro-batch of a step, and the positions of its samples in the task."""
        main = self.data.history.samples_of(step)
        firsts = [main.start, *self._mixing.samples_before(main.start)]
        for micro_step in self.plan(step):
            first = firsts[micro_step.task]
            firsts[micro_step.task] += self.micro_batch_size
            yield micro_step.task, range(first, firsts[micro_step.task])


def _check_batches(run: Path, origin: Origin, first: int, step: int) -> None:
    """Check that all steps read as many samples as the last one, since an engine has one batch size."""
    history, size = origin.data.history, origin.config.training.global_batch_size
    for number in range(first, step + 1):
        if (samples := len(history.samples_of(number))) != size:
            raise UserError(
                run,
                f"step {number} read {samples} samples and step {step} read {size}, and no whole checkpoint is left "
                "between the two",
                "put one back, or replay an earlier step",
            )


def _repeat(
    engine: Engine, samples: _Samples, origin: Origin, judge: BadSteps, number: int, log: Callable[[str], None]
) -> None:
    """Take a step before the one that is asked for; leave it out where the run has left it out."""
    rate, steps = learning_rate(engine.config, number), origin.steps

    def accepts(result: StepResult) -> bool:
        return number not in steps.skipped and (number in steps.taken or judge.accepts(result))

    result = engine.train_step(samples.of(number), rate, False, accepts, samples.plan(number))
    judge.judge(number, result, at_least_scale=False, newest=origin.run.start.path)
    log(f"step {number}: {_brief(result)}")
    if number in steps.taken and result.skipped:
        log(f"step {number}: was left out, and the run has taken it")
    recorded = steps.numbers.get(number)
    if recorded is not None and (difference := recorded.difference(result, rate, engine.config.precision.compute)):
        log(f"step {number}: {difference}")


def _watch(engine: Engine, samples: _Samples, step: int, origin: Origin) -> Replay:
    """Take ``step`` with every module watched."""
    model = engine.deepspeed.module
    rate = learning_rate(engine.config, step)
    with ModuleTrace(model, loss_scale(engine.deepspeed)) as trace:
        result = engine.train_step(samples.of(step), rate, plan=samples.plan(step))
    names = ["embedding", *(f"layers.{index}" for index in range(len(model.layers))), "norm"]
    bad_samples = bad_task = None
    if trace.first_bad is not None:
        task, bad_samples = list(samples.positions(step))[trace.first_bad.micro_batch]
        bad_task = samples.tasks[task].name
    recorded = origin.recorded
    return Replay(
        step=step,
        checkpoint=origin.run.start.path,
        config=origin.config_file,
        incident=origin.incident,
        result=result,
        learning_rate=rate,
        recorded=recorded,
        difference=recorded.difference(result, rate, engine.config.precision.compute) if recorded is not None else "",
        layers=[LayerNorms(name, trace.output_norm(name), trace.gradient_norm(name)) for name in names],
        first_bad=trace.first_bad,
        samples=bad_samples,
        task=bad_task,
    )


def _brief(result: StepResult) -> str:
    skipped = ", left out" if result.skipped else ""
    return f"loss {result.loss:.4f}, gradient norm {result.gradient_norm:.4f}{skipped}"
