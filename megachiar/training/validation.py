"""Evaluate validation sets while a run trains; a stop puts an evaluation off, and the run makes up for it later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from megachiar.activity import Stage
from megachiar.data.sampling.dataset import ValidationSet
from megachiar.data.sampling.examples import ExampleSet
from megachiar.engine.engine import Engine
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
        measured: is called with the step, the name of the set and the loss of each result that is finite, before the
            metrics have it: what a kill in between cuts off is measured again.
    """

    def __init__(
        self,
        engine: Engine,
        datasets: Mapping[str, ValidationSet | ExampleSet],
        writer: MetricsWriter | None,
        display: Display,
        supervision: Supervision,
        measured: Callable[[int, str, float], None] = lambda step, name, loss: None,
    ):
        self._engine = engine
        self._datasets = datasets
        self._writer = writer
        self._display = display
        self._signals = supervision.signals
        self._activity = supervision.activity
        self._measured = measured
        self._losses: dict[str, float] = {}
        self._measured_step: int | None = None

    def losses_after(self, step: int) -> dict[str, float]:
        """Return the losses in nats a token that were measured after ``step`` and are finite, by name of the set."""
        return self._losses if step == self._measured_step else {}

    def run_if_due(self, step: int, *, put_off: bool) -> bool:
        """Evaluate all sets if an evaluation is due after ``step``, as ``run`` does."""
        every, steps = self._engine.config.training.evaluate_every, self._engine.config.steps
        due = step == steps or (every is not None and step % every == 0)
        return self.run(list(self._datasets) if due else [], step, put_off=put_off)

    def run(self, names: Sequence[str], step: int, *, put_off: bool = False, is_owed: bool = False) -> bool:
        """Evaluate validation sets and record the results; every rank calls this method.

        Args:
            names: of the sets; a set that the run no longer has is left out.
            step: optimizer steps taken.
            put_off: whether to evaluate none, since the run stops. A stop in the middle puts off the rest.
            is_owed: whether these were put off before. The one that is broken off is then left out, since it may take
                longer than a job has: the run would never make a step again.

        Returns:
            Whether no evaluation was put off.
        """
        left = [name for name in names if name in self._datasets]
        while left and not put_off:
            try:
                self._record(left[0], step, self._evaluate(left[0], step))
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

    def _record(self, name: str, step: int, result: Evaluation | Classification) -> None:
        if step != self._measured_step:
            self._losses, self._measured_step = {}, step
        if math.isfinite(result.loss):
            self._losses[name] = result.loss
            self._measured(step, name, result.loss)
        if self._writer is not None:
            self._writer.write(step, f"{EVALUATION}{name}", result.as_dict())
        self._display.line(f"[bold]step {step}  {name}: {result.describe()}[/]")


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
