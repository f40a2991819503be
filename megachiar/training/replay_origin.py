"""Find what a step is repeated from: checkpoint, config and data, as the run had them when it took the step.

    with an incident       its config, its data, and the checkpoint whose fingerprint it records
    without one            the newest whole checkpoint before the step, and the config of the first one after it

A run changes its config only where it continues from a checkpoint. So the checkpoint after the step has the config of
the step, unless one between them was removed. The learning rates in ``metrics.jsonl`` then tell which config it was.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megachiar.checkpoint.format import (
    CONFIG_FILE,
    checkpoint_name,
    checkpoint_step,
    complete_checkpoints,
    find_damage,
    fingerprint_of,
    read_state,
)
from megachiar.checkpoint.reading import locate_checkpoint
from megachiar.checkpoint.removal import named_or_set_aside
from megachiar.checkpoint.verify import find_damaged_file, verify_alone
from megachiar.config import RunConfig, load_config
from megachiar.config.cuda_graphs import needs_static_shapes
from megachiar.config.sections import ParallelConfig
from megachiar.data.sampling.history import DataHistory
from megachiar.errors import UserError
from megachiar.training.continuation import Continuation, continue_run, open_run
from megachiar.training.incident_record import IncidentRecord, find_incident, read_incident
from megachiar.training.moved_data import with_data_of_step
from megachiar.training.recorded_steps import NO_STEPS, RecordedStep, RecordedSteps, read_recorded_steps, recorded_in
from megachiar.training.rollback_record import read_rollback
from megachiar.training.run_data import RunData
from megachiar.training.schedule import learning_rate
from megachiar.training.start import Start


@dataclass(frozen=True)
class Origin:
    """What a step is repeated from.

    Attributes:
        config: of the step, for one process.
        config_file: that it was read from.
        run: the run at the checkpoint, or at its beginning.
        data: that the step and those before it have read.
        incident: folder of the incident of the step; None where the run recorded none.
        steps: what the run recorded of the steps from there on.
        recorded: what it recorded of the step; None where it recorded nothing.
        remarks: lines for the log about what is not as it was.
    """

    config: RunConfig
    config_file: Path
    run: Continuation
    data: RunData
    incident: Path | None
    steps: RecordedSteps
    recorded: RecordedStep | None
    remarks: Sequence[str] = field(default=())


def find_origin(run: Path, step: int, overrides: Sequence[str] = ()) -> Origin:
    """Return what ``step`` of the run in folder ``run`` is repeated from.

    Args:
        run: the run folder.
        step: counted from 1.
        overrides: each ``"a.b=value"``, over the config of the step.

    Raises:
        UserError: there is no such run; or its data is gone, or a record of it is damaged.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UserError(run, "is no run folder: it has no config.yaml", "give logging.folder of the run's config")
    complete = complete_checkpoints(run / "checkpoints")
    incident = find_incident(run, step)
    if incident is not None:
        return _origin_of_incident(run, step, incident, complete, overrides)
    before = _newest_whole(_before(complete, step))
    steps = read_recorded_steps(run, _steps_after(before, step))
    file = _config_file(run, complete, before, step, steps)
    config = single_process(load_config(file, overrides))
    history = _recorded_history(run, complete, step)
    if history is not None:
        config = with_data_of_step(config, history, step, _paths(run, complete, config))
    config, data = open_run(config)
    origin = continue_run(config, data, _start(config, before))
    data = data.with_history(history) if history is not None else _continued(run, complete, data, origin)
    remarks = [*_describe_doubt(file, step, steps), *steps.unknown]
    return Origin(config, file, origin, data, None, steps, steps.numbers.get(step), remarks)


def single_process(config: RunConfig) -> RunConfig:
    """Return the config of a run that trains the same on one process, without what hides a module's numbers.

    The history of the data says what was read, so that nothing of it is refused; no step evaluates or names tokens.
    """
    data: dict[str, object] = {"on_change": "continue", "max_epochs": None, "validation": {}, "tokenizer": None}
    training: dict[str, object] = {"activation_checkpoint_interval": None, "compile": None, "cuda_graphs": None}
    if config.training.cuda_graphs is not None and needs_static_shapes(config.model):  # as the graphs had them
        training["static_shapes"] = True
    if config.training.steps is not None:  # it holds what the epochs made of the data of that time
        training["epochs"] = None
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "parallel": ParallelConfig(zero_stage=0 if config.precision.compute == "fp32" else 1),
            "precision": config.precision.model_copy(update={"kernels": "auto"}),
            "training": config.training.model_copy(update=training),
            "optimizer": config.optimizer.model_copy(update={"implementation": "torch"}),
            "deepspeed": {},
        }
    )


def _origin_of_incident(run: Path, step: int, incident: Path, complete: list[Path], overrides: Sequence[str]) -> Origin:
    record = read_incident(incident)
    before = _newest_whole(_checkpoints_of(run, record, incident, complete, step))
    steps = _steps_of_incident(run, record, before, _steps_after(before, step))
    file, history = incident / CONFIG_FILE, record.data.until(step)
    config = single_process(load_config(file, overrides))
    config = with_data_of_step(config, history, step, _paths(run, complete, config))
    config, data = open_run(config)
    origin = continue_run(config, data, _start(config, before))
    remarks = [*_describe_missing(run, record, before), *steps.unknown]
    return Origin(config, file, origin, data.with_history(history), incident, steps, recorded_in(record), remarks)


def _steps_after(checkpoint: Path | None, last: int) -> range:
    """Return the numbers of the steps from a checkpoint, or the beginning of the run, up to ``last``."""
    return range((read_state(checkpoint).step if checkpoint is not None else 0) + 1, last + 1)


def _before(complete: Sequence[Path], step: int) -> list[Path]:
    """Return the checkpoints before ``step``, newest first."""
    return [path for path in reversed(complete) if read_state(path).step < step]


def _newest_whole(newest_first: Iterable[Path]) -> Path | None:
    return next((path for path in newest_first if verify_alone(path) is None), None)


def _checkpoints_of(
    run: Path, record: IncidentRecord, incident: Path, complete: Sequence[Path], step: int
) -> list[Path]:
    """Return the checkpoints that the run had at an incident and that are still there, newest first.

    A run that went back since has set some aside. It may have saved others of the same names, which are not meant.
    """
    if record.fingerprints is None:
        return [*_with_same_config(run, record, incident), *_before(complete, step)]
    recorded = {number: text for name, text in record.fingerprints.items() if (number := checkpoint_step(Path(name)))}
    return [
        path
        for number in sorted(recorded, reverse=True)
        for path in named_or_set_aside(run / "checkpoints", checkpoint_name(number))
        if number < step and find_damage(path) is None and fingerprint_of(path) == recorded[number]
    ]


def _with_same_config(run: Path, record: IncidentRecord, incident: Path) -> list[Path]:
    """Return the checkpoints called as an incident records that have its config; others are of later runs."""
    named = named_or_set_aside(run / "checkpoints", checkpoint_name(record.checkpoint_step))
    whole = [path for path in named if find_damage(path) is None and _has_whole_config(path)]
    config = load_config(incident / CONFIG_FILE)
    return [path for path in whole if load_config(path / CONFIG_FILE) == config]


def _steps_of_incident(run: Path, record: IncidentRecord, before: Path | None, wanted: range) -> RecordedSteps:
    """Return what is known of the steps before an incident; metrics after its checkpoint may be of other steps."""
    is_set_aside = before is not None and checkpoint_step(before) is None  # the run has removed its metrics
    if record.fingerprints is None:
        return NO_STEPS if is_set_aside else read_recorded_steps(run, wanted)
    last = record.checkpoint_step
    earlier = read_recorded_steps(run, range(wanted.start, last + 1)) if not is_set_aside else NO_STEPS
    skipped = {*earlier.skipped, *record.skipped_steps}
    since = set(range(last + 1, wanted.stop)) - skipped
    return RecordedSteps({}, skipped, {*earlier.taken, *since}, earlier.unknown)


def _describe_missing(run: Path, record: IncidentRecord, found: Path | None) -> list[str]:
    """Return a line for the log where the checkpoint before an incident is not what its replay starts from."""
    if record.checkpoint is None:
        return []
    folder, name = run / "checkpoints", checkpoint_name(record.checkpoint_step)
    if found is None or not (found.name == name or found in named_or_set_aside(folder, name)):
        other = record.fingerprints is not None and find_damage(folder / name) is None
        return [
            f"{folder / name}, the checkpoint before the incident, is gone or damaged"
            + (" (what is there now, the run has saved since)" if other else "")
            + ", so that more steps are repeated. A run keeps that of its newest incident; checkpoint.keep and "
            "keep_every keep more"
        ]
    twins = [path for path in named_or_set_aside(folder, name) if path != found]
    if record.fingerprints is None and twins:
        return [f"the incident does not tell which it came after, {found} or {twins[0]}: the replay takes the first"]
    return []


def _config_file(run: Path, complete: Sequence[Path], before: Path | None, step: int, steps: RecordedSteps) -> Path:
    """Return the config that the step was taken with: of the first candidate that has its recorded learning rate.

    The candidates are the first checkpoint after the step, the run folder, and the checkpoint before the step.
    """
    after = next((path for path in complete if read_state(path).step >= step and _has_whole_config(path)), None)
    candidates = [folder / CONFIG_FILE for folder in (after, run, before) if folder is not None]
    own = {step: steps.numbers[step]} if step in steps.numbers else {}
    return next((file for file in candidates if _fits(file, own)), candidates[0])


def _describe_doubt(file: Path, step: int, steps: RecordedSteps) -> list[str]:
    """Return a line for the log where it cannot be told whether the step was taken with a config."""
    if step in steps.numbers or _fits(file, steps.numbers):
        return []
    return [
        f"step {step} has no record of its own, and steps before it had another learning rate than {file} gives: "
        "the step may have had another config"
    ]


def _has_whole_config(checkpoint: Path) -> bool:
    return find_damaged_file(checkpoint, read_state(checkpoint), [CONFIG_FILE]) is None


def _fits(file: Path, recorded: Mapping[int, RecordedStep]) -> bool:
    """Return whether a config gives the recorded learning rates of steps."""
    try:
        config = load_config(file)
    except UserError:
        return False
    if config.training.steps is None:
        return False
    rates = {number: numbers.learning_rate for number, numbers in recorded.items()}
    return all(
        rate is None or math.isclose(learning_rate(config, number), rate, rel_tol=1e-9)
        for number, rate in rates.items()
    )


def _recorded_history(run: Path, complete: Sequence[Path], step: int) -> DataHistory | None:
    """Return the history of the data up to a step that the newest checkpoint records; None if it is older."""
    if not complete or (newest := read_state(complete[-1])).step < step:
        return None
    return newest.data.until(step)


def _continued(run: Path, complete: Sequence[Path], data: RunData, origin: Continuation) -> RunData:
    """Return the data of a step after the newest checkpoint, as a run reads it that continues from there."""
    if not complete:
        return origin.data
    data = replace(data, tasks_read=origin.data.tasks_read)
    newest, rollback = read_state(complete[-1]), read_rollback(run, complete[-1])
    return data.continue_from(newest.data, newest.step, rollback.data if rollback is not None else None)


def _paths(run: Path, complete: Sequence[Path], config: RunConfig) -> list[Path]:
    """Return where a dataset of the run may be: by the step's config, by the newest one, by the newest checkpoint."""
    paths = [Path(source.path) for source in config.data.train]
    with contextlib.suppress(UserError):
        paths += [Path(source.path) for source in load_config(run / CONFIG_FILE).data.train]
    if complete:
        paths += [Path(source.path) for source in read_state(complete[-1]).data.sources]
    return paths


def _start(config: RunConfig, before: Path | None) -> Start:
    """Return the start of the steps: at a checkpoint of the run, or else where the run began."""
    if before is not None:
        return Start("resumed", before, read_state(before).step)
    if config.checkpoint.load_from is None:
        return Start("fresh")
    other = locate_checkpoint(config.checkpoint.load_from)
    return Start(config.checkpoint.load, other, read_state(other).step if config.checkpoint.load == "all" else 0)
