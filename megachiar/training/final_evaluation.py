"""Measure a run once it has taken its last step: the test sets with the weights of its best checkpoint.

    trained to the last step, and saved --> best checkpoint --> its weights --> test sets --> RUN/results.json

A stop breaks it off and leaves nothing; the run makes up for it when it is started again. A run that has its result
does nothing. One that goes on to more steps is measured anew at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape

from megachiar.activity import Stage
from megachiar.checkout import own_commit
from megachiar.checkpoint.format import CONFIG_FILE, complete_checkpoints, read_state
from megachiar.checkpoint.removal import best_checkpoint
from megachiar.checkpoint.resume import load_weights
from megachiar.config import RunConfig, load_config
from megachiar.config.evaluation import TASK_PREFIX
from megachiar.config.identity import config_digest
from megachiar.engine.engine import Engine
from megachiar.errors import EXIT_STOPPED, UserError
from megachiar.model import build_model
from megachiar.topology import raise_together
from megachiar.training.asked import SAMPLES, Asked
from megachiar.training.break_off import EvaluationBrokenOff
from megachiar.training.continuation import Progress
from megachiar.training.metrics import EVALUATION, read_metrics
from megachiar.training.run_data import RunData, record_of
from megachiar.training.run_result import (
    BestCheckpoint,
    BestMeasure,
    Measures,
    RunResult,
    SetMeasures,
    read_result,
    result_path,
    write_result,
)
from megachiar.training.start import broadcast_from_rank_0, check_whole
from megachiar.training.supervision import Supervision
from megachiar.training.validation import evaluate_set

_OF_RECORDS = 0.1  # share of a run's records, up to the tested step, that attention shares are means of


def has_result(config: RunConfig, data: RunData) -> bool:
    """Return whether the run folder holds the result that the run of ``config`` has; a damaged one is none."""
    try:
        result = read_result(config.logging.folder)
    except UserError:
        return False
    return result is not None and result.is_of(config.steps, config.checkpoint.chosen_by, data.test_records())


class FinalEvaluation:
    """The last part of a run, on all ranks together.

    Args:
        engine: with the weights of the last step; it may hold those of another checkpoint afterwards.
        data: of the run.
        progress: of the run, which has taken its last step and saved it.
        supervision: of this rank.
        has_trained: whether this process has taken steps. One that has not heeds signals alone, not
            training.stop_after: the run would never get its result.
        asked: tasks and prompts of the run.
        log: prints a line of the log, in rich's markup.
    """

    def __init__(
        self,
        engine: Engine,
        data: RunData,
        progress: Progress,
        supervision: Supervision,
        has_trained: bool,
        asked: Asked,
        log: Callable[[str], None],
    ):
        self._engine, self._data, self._progress = engine, data, progress
        self._supervision, self._has_trained, self._log = supervision, has_trained, log
        self._asked, self._config = asked, engine.config

    def run(self, damaged_data: Callable[[], UserError | None]) -> int:
        """Measure the run and write its result; every rank calls this method.

        Args:
            damaged_data: returns the error of a block of data that this rank has found damaged; None if it found none.

        Returns:
            The exit code of the process: 0, or 75 if a signal or ``training.stop_after`` came first.

        Raises:
            LaunchError: the best checkpoint or the data is damaged, or the disk refuses the result. Every rank raises
                it.
        """
        chosen = self._choose()
        try:
            measures = self._test(chosen)
        except EvaluationBrokenOff:
            why = self._supervision.signals.reason() or "a signal to another rank"
            self._log(f"stopped by {why} before the test was done: it is made up for when the run is started again")
            return EXIT_STOPPED
        problem = damaged_data()
        if self._engine.topology.is_main and problem is None:
            try:
                write_result(self._config.logging.folder, self._result(chosen, measures))
            except UserError as error:
                problem = error
        raise_together(problem)
        self._log(f"results of the run: {escape(str(result_path(self._config.logging.folder)))}")
        return 0

    def _choose(self) -> _Chosen:
        """Return what rank 0 finds to be the best checkpoint."""
        problem, chosen = None, None
        if self._engine.topology.is_main:
            try:
                chosen = choose_checkpoint(self._config)
            except UserError as error:
                problem = error
        raise_together(problem)
        return broadcast_from_rank_0(chosen)

    def _test(self, chosen: _Chosen) -> dict[str, Measures]:
        """Return the measures of each test set, with the weights of the chosen checkpoint.

        Raises:
            EvaluationBrokenOff: a rank was asked to stop; every rank raises it.
        """
        engine, step, activity = self._engine, self._progress.step, self._supervision.activity
        if self._data.test and chosen.best.step != step:
            activity.begin(f"loads {chosen.path.name} for the test", Stage.TEST, step)
            check_whole(chosen.path, engine.topology)
            load_weights(engine, chosen.path)
            self._log(f"test with {escape(str(chosen.path))}: {escape(chosen.best.reason)}")
        found, before = {}, 0
        for name, dataset in self._data.test.items():

            def doing(window: int, name: str = name, before: int = before) -> None:
                activity.begin(f"tests on {name} from window {window} on", Stage.TEST, step, 1 + before + window)

            result = evaluate_set(engine, dataset, None, self._is_asked_to_stop, doing)
            found[name] = result.as_dict()
            before += dataset.windows
            self._log(f"[bold]test, step {chosen.best.step}  {escape(name)}: {describe_measures(found[name])}[/]")
        return found

    def _is_asked_to_stop(self) -> bool:
        signals = self._supervision.signals
        return signals.received is not None or (self._has_trained and signals.reason() is not None)

    def _result(self, chosen: _Chosen, test: dict[str, Measures]) -> RunResult:
        config, data, steps = self._config, self._data, self._progress.step
        records = _records_of(config.logging.folder)
        train = [record for record in records if record["kind"] == "train"]
        layers, first = attention_shares(train, chosen.best.step)
        routed = [layers[layer] for layer in config.model.routed_layers] if layers else []
        return RunResult(
            commit=own_commit(),
            config_digest=config_digest(_trained_config(config, chosen.last)),
            model=config.model.kind,
            parameters=build_model(config.model, seed=0, device="meta", heads=config.heads).parameter_count(),
            seeds=seeds_of(config),
            train=[record_of(source) for source in data.training.sources],
            validation_data=data.validation_records(),
            test_data=data.test_records(),
            steps=steps,
            samples=self._progress.samples,
            tokens=data.history.tokens_before(self._progress.samples) if config.tasks[0].head is None else None,
            training_seconds=training_seconds(train),
            attention_share=sum(routed) / len(routed) if routed else None,
            attention_share_of_layers=layers,
            shares_from_step=first,
            keep_best=config.checkpoint.chosen_by,
            best=chosen.best,
            validation={
                name: SetMeasures(best=_measured(records, name, chosen.best.step), last=_measured(records, name, steps))
                for name in data.validation
            },
            tasks={
                name: SetMeasures(
                    best=_record_of(records, name, chosen.best.step), last=_record_of(records, name, steps)
                )
                for name in self._asked.names
                if name != SAMPLES
            },
            best_of_each=best_of_each(records, self._asked),
            test=test,
        )


class _Chosen(NamedTuple):
    """The checkpoint that a run is tested with.

    Attributes:
        path: of the checkpoint.
        last: path of the run's last checkpoint.
        best: its description.
    """

    path: Path
    last: Path
    best: BestCheckpoint


def choose_checkpoint(config: RunConfig) -> _Chosen:
    """Return the checkpoint that a finished run is tested with: the best by ``checkpoint.keep_best``.

    Raises:
        UserError: the folder of checkpoints cannot be read, or holds none.
    """
    complete, keep_best = complete_checkpoints(config.checkpoint_folder), config.checkpoint.chosen_by
    if not complete:
        raise UserError(
            config.checkpoint_folder, "holds no checkpoint to test", "start the run again: it trains what is missing"
        )
    last = complete[-1]
    path = best_checkpoint(complete, keep_best)
    if path is None:
        why = "checkpoint.keep_best names no validation set"
        if keep_best is not None:
            why = f"no checkpoint has a {'value of' if is_of_task(config, keep_best) else 'loss on'} {keep_best}"
        step = read_state(last).step
        return _Chosen(last, last, BestCheckpoint(step=step, reason=f"the last checkpoint, since {why}"))
    state = read_state(path)
    value = state.validation[str(keep_best)]
    if is_of_task(config, str(keep_best)):
        which = "highest" if keep_best in state.maximised else "lowest"
        reason = f"the checkpoint with the {which} {keep_best}, {value:.4f}"
        best = BestCheckpoint(step=state.step, chosen_by=keep_best, value=value, reason=reason)
    else:
        reason = f"the checkpoint with the lowest loss on {keep_best}, {value:.4f}"
        best = BestCheckpoint(step=state.step, chosen_by=keep_best, loss=value, reason=reason)
    return _Chosen(path, last, best)


def is_of_task(config: RunConfig, name: str) -> bool:
    """Return whether a name in ``checkpoint.keep_best`` is that of what a task measures, and not of a set."""
    sets = {*config.data.validation, *config.mixed.tasks}
    return name not in sets and name.startswith(TASK_PREFIX)


def seeds_of(config: RunConfig) -> dict[str, int]:
    """Return every seed of a run by its key."""
    return {key: value for key, value in config.flat().items() if key.rpartition(".")[2] == "seed"}


def describe_measures(measures: Measures) -> str:
    """Return the numbers among the measures of a set as text for the log."""
    shown = {name: value for name, value in measures.items() if isinstance(value, int | float) and name != "complete"}
    return "  ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in shown.items())


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


def training_seconds(train: list[dict[str, Any]]) -> float | None:
    """Return the seconds that the steps of a run took, from its records of kind ``train``; None without records.

    A record has the rate of the steps since the line of the log before it, or since the start of the process that wrote
    it. Steps in between, which a killed process took, count at the rate of the record after them.
    """
    seconds, samples_before = 0.0, 0
    for record in train:
        rate, samples = record.get("samples_per_second"), record.get("samples")
        if not rate or samples is None:
            return None
        seconds += (samples - samples_before) / rate
        samples_before = samples
    return seconds if train else None


def attention_shares(train: list[dict[str, Any]], step: int) -> tuple[list[float] | None, int | None]:
    """Return the mean attention share of each layer where the weights of ``step`` were reached.

    Args:
        train: the run's records of kind ``train``.
        step: of the checkpoint that is tested. A router that learns or is annealed has other shares at other steps.

    Returns:
        The mean over a tenth of the run's records, the last ones up to ``step``, and the step of the first of them.
        None where the run has no such records.
    """
    recorded = [record for record in train if record.get("attention_share")]
    count = max(1, math.ceil(_OF_RECORDS * len(recorded)))
    kept = [record for record in recorded if record["step"] <= step][-count:]
    if not kept:
        return None, None
    columns = zip(*(record["attention_share"] for record in kept), strict=True)
    return [sum(column) / len(kept) for column in columns], kept[0]["step"]


def _records_of(run: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(run)
    except UserError:  # the disk refused them while the run trained, and the log said so
        return []


def _measured(records: list[dict[str, Any]], name: str, step: int) -> Measures | None:
    """Return the measures of a validation set that were recorded after ``step``, the newest if there are several."""
    return _record_of(records, f"{EVALUATION}{name}", step)


def _record_of(records: list[dict[str, Any]], kind: str, step: int) -> Measures | None:
    """Return the values of the newest record of a kind after ``step``; None if there is none."""
    found = [record for record in records if record["step"] == step and record["kind"] == kind]
    return {key: value for key, value in found[-1].items() if key not in ("step", "kind")} if found else None


def best_of_each(records: list[dict[str, Any]], asked: Asked) -> dict[str, BestMeasure]:
    """Return the best loss on each validation set, and the best of each measure of tasks, of all evaluations.

    Args:
        records: of ``metrics.jsonl``.
        asked: tasks of the run. Measures of which they do not say what is better, such as those of a task that the run
            had before it was continued, are left out.
    """
    found: dict[str, BestMeasure] = {}
    for record in records:
        is_of_task = record["kind"].startswith(TASK_PREFIX)
        for name, value in _measures_in(record):
            is_higher = name in asked.maximised
            if is_of_task and not is_higher and name not in asked.minimised:
                continue
            before = found.get(name)
            if before is None or (value > before.value if is_higher else value < before.value):
                found[name] = BestMeasure(value=value, step=record["step"], higher_is_better=is_higher)
    return found


def _measures_in(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield name and value of what a record of the metrics tells of a validation set or a task."""
    kind = record["kind"]
    if kind.startswith(EVALUATION) and record.get("loss") is not None:
        yield kind.removeprefix(EVALUATION), record["loss"]
    elif kind.startswith(TASK_PREFIX):
        for metric, value in record.items():
            if metric not in ("step", "kind") and value is not None:
                yield f"{kind}/{metric}", value


def _trained_config(config: RunConfig, last: Path) -> RunConfig:
    """Return the config that trained the last checkpoint, with what ``config`` says of the test.

    A finished run may be started again with another config, for another test set. Its weights stay those of the first.
    """
    trained = load_config(last / CONFIG_FILE)
    data = trained.data.model_copy(update={"test": config.data.test})
    checkpoint = trained.checkpoint.model_copy(update={"keep_best": config.checkpoint.keep_best})
    return trained.model_copy(update={"data": data, "checkpoint": checkpoint})
