"""Evaluate a run while it trains, on validation sets, tasks and prompts; what a stop puts off is made up for later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.markup import escape

from megachiar.activity import Stage
from megachiar.data.sampling.dataset import ValidationSet
from megachiar.data.sampling.examples import ExampleSet
from megachiar.engine.engine import Engine
from megachiar.training.asked import SAMPLES, Asked, NothingAsked
from megachiar.training.break_off import BreakOff, EvaluationBrokenOff
from megachiar.training.classification import Classification, evaluate_examples
from megachiar.training.display import Display
from megachiar.training.evaluation import Evaluation, evaluate
from megachiar.training.metrics import EVALUATION, MetricsWriter
from megachiar.training.owed_evaluation import KIND as OWED
from megachiar.training.supervision import Supervision


class Validation:
    """Evaluates the model of a run, on all ranks together.

    Args:
        engine: that holds the model.
        datasets: the validation sets by name.
        writer: of the metrics; None on all ranks but rank 0.
        display: of this rank.
        supervision: of this rank.
        measured: is called with the step, and the losses on a set or the measures of a task by name, as far as they are
            finite, before the metrics have them: what a kill in between cuts off is measured again.
        asked: the tasks and prompts of the run.
    """

    def __init__(
        self,
        engine: Engine,
        datasets: Mapping[str, ValidationSet | ExampleSet],
        writer: MetricsWriter | None,
        display: Display,
        supervision: Supervision,
        measured: Callable[[int, Mapping[str, float]], None] = lambda step, measures: None,
        asked: Asked | None = None,
    ):
        self._engine = engine
        self._datasets = datasets
        self._writer = writer
        self._display = display
        self._signals = supervision.signals
        self._activity = supervision.activity
        self._measured = measured
        self._asked: Asked = asked or NothingAsked()
        self._losses: dict[str, float] = {}
        self._measured_step: int | None = None

    def losses_after(self, step: int) -> dict[str, float]:
        """Return what was measured after ``step`` and is finite: losses by name of the set, and measures of tasks."""
        return self._losses if step == self._measured_step else {}

    def run_if_due(self, step: int, *, put_off: bool) -> bool:
        """Evaluate what is due after ``step``, as ``run`` does; at step 0 that is all or nothing."""
        config = self._engine.config
        of_sets, of_asked = config.training.evaluate_every, config.evaluation.tasks_every
        names = [*self._datasets] if self._is_due(of_sets, step) else []
        if self._is_due(of_asked or of_sets, step):
            names += self._asked.names
        return self.run(names, step, put_off=put_off)

    def _is_due(self, every: int | None, step: int) -> bool:
        config = self._engine.config
        if step == 0:
            return config.evaluation.at_start
        return step == config.steps or (every is not None and step % every == 0)

    def run(self, names: Sequence[str], step: int, *, put_off: bool = False, is_owed: bool = False) -> bool:
        """Evaluate validation sets, tasks and prompts, and record the results; every rank calls this method.

        Args:
            names: of the sets, and of what is asked; what the run no longer has is left out.
            step: optimizer steps taken.
            put_off: whether to evaluate none, since the run stops. A stop in the middle puts off the rest.
            is_owed: whether these were put off before. The one that is broken off is then left out, since it may take
                longer than a job has: the run would never make a step again.

        Returns:
            Whether no evaluation was put off.
        """
        left = [name for name in names if name in self._datasets or name in self._asked.names]
        while left and not put_off:
            try:
                self._evaluate_and_record(left[0], step)
                left.pop(0)
            except EvaluationBrokenOff:
                put_off = True
                if is_owed:
                    self._display.line(f"evaluation of {left.pop(0)} after step {step} broken off again: left out")
        if put_off and (left or is_owed) and self._writer is not None:
            self._writer.write(step, OWED, {"names": left})
        if left:
            self._display.line(f"evaluation of {', '.join(left)} put off: it is made up for when the run goes on")
        return not put_off or not (left or is_owed)

    def _evaluate_and_record(self, name: str, step: int) -> None:
        """Evaluate one set, task or all prompts, and record the result.

        Raises:
            EvaluationBrokenOff: a rank was asked to stop; every rank raises it.
        """
        if name in self._datasets:
            result = self._evaluate(name, step)
            self._record(step, f"{EVALUATION}{name}", result.as_dict(), {name: result.loss})
            self._display.line(f"[bold]step {step}  {name}: {result.describe()}[/]")
        elif name == SAMPLES:
            self._sample(step)
        else:
            measures = self._ask(name, step)
            self._record(step, name, measures, {f"{name}/{metric}": value for metric, value in measures.items()})
            shown = "  ".join(f"{metric} {value:.4f}" for metric, value in measures.items())
            self._display.line(f"[bold]step {step}  {escape(name)}: {escape(shown)}[/]")

    def _ask(self, name: str, step: int) -> dict[str, Any]:
        """Return the measures of a task.

        Raises:
            EvaluationBrokenOff: a rank was asked to stop; every rank raises it.
        """
        break_off = BreakOff(lambda: self._signals.reason() is not None, self._engine.sum_over_world)

        def before_batch(done: int) -> None:
            self._activity.begin(f"measures {name}, {done} texts done", Stage.EVALUATE, step, done)
            if break_off.asked():
                raise EvaluationBrokenOff

        return dict(self._asked.measure(name, before_batch))

    def _sample(self, step: int) -> None:
        """Let the run continue its prompts."""
        self._activity.begin("continues prompts", Stage.EVALUATE, step)
        samples = self._asked.continue_prompts(step)
        for prompt, text in samples:
            self._display.line(f"step {step}  {escape(repr(prompt))} -> {escape(repr(text))}")
        if self._writer is not None:
            self._writer.write_samples(step, samples)
            self._writer.write(step, SAMPLES, {"count": len(samples)})

    def _evaluate(self, name: str, step: int) -> Evaluation | Classification:
        """Return the result for a set.

        Raises:
            EvaluationBrokenOff: a rank was asked to stop; every rank raises it.
        """

        def doing(window: int) -> None:
            self._activity.begin(f"evaluates {name} from window {window} on", Stage.EVALUATE, step, window)

        windows = self._engine.config.training.evaluation_windows
        stop = lambda: self._signals.reason() is not None  # noqa: E731
        return evaluate_set(self._engine, self._datasets[name], windows, stop, doing)

    def _record(self, step: int, kind: str, values: dict[str, Any], measures: Mapping[str, float]) -> None:
        """Keep measures that tell the best checkpoint, and write a record."""
        if step != self._measured_step:
            self._losses, self._measured_step = {}, step
        finite = {name: value for name, value in measures.items() if math.isfinite(value)}
        if finite:
            self._losses.update(finite)
            self._measured(step, finite)
        if self._writer is not None:
            self._writer.write(step, kind, values)


def evaluate_set(
    engine: Engine,
    dataset: ValidationSet | ExampleSet,
    windows: int | None,
    stop: Callable[[], bool],
    doing: Callable[[int], None],
) -> Evaluation | Classification:
    """Measure the engine's model on a dataset; every rank calls this function.

    Args:
        engine: that holds the model.
        dataset: to read.
        windows: of the dataset, or examples, that are read, from the first on; None reads all.
        stop: whether this rank is asked to stop.
        doing: says what this rank does, before each batch, with the number of its first window on rank 0.

    Raises:
        EvaluationBrokenOff: a rank was asked to stop; every rank raises it.
    """
    break_off = BreakOff(stop, engine.sum_over_world)

    def before_batch(window: int) -> None:
        doing(window)
        if break_off.asked():
            raise EvaluationBrokenOff

    batch_size, topology = engine.config.training.micro_batch_size, engine.topology
    if isinstance(dataset, ExampleSet):
        return evaluate_examples(
            engine.classify,
            dataset,
            batch_size,
            examples=windows,
            rank=topology.data_rank,
            ranks=topology.data_size,
            reduce_sum=engine.sum_over_world,
            before_batch=before_batch,
        )
    return evaluate(
        engine.evaluate,
        dataset,
        batch_size,
        windows=windows,
        rank=topology.data_rank,
        ranks=topology.data_size,
        reduce_sum=engine.sum_over_world,
        before_batch=before_batch,
    )
