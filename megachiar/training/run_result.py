"""What a finished run is judged by: one record a run, ``RUN/results.json``, written after its last step.

The test sets are measured once, with the weights of one checkpoint. A set of data.validation has chosen that checkpoint
(checkpoint.keep_best), or it is the last one. A set's measures are a mapping from names to numbers; which measures
there are depends on the task alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megachiar import __version__
from megachiar.data.sampling.history_records import SourceRecord
from megachiar.data.storage.files import sync_folder, write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_sealed, pretty_sealed
from megachiar.errors import UserError, disk_errors
from megachiar.training.json_lines import without_nan

FORMAT_VERSION: Final = 1
RESULT_FILE = "results.json"
Measures = dict[str, Any]
"""The measures of a set by name: numbers, booleans, and None for a measure that has no value."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class BestCheckpoint(_Record):
    """Which checkpoint a run is tested with.

    Attributes:
        step: its step.
        chosen_by: name of the validation set on which it has the lowest loss; None for the last checkpoint.
        loss: that loss, in nats a token or labelled sequence; None for the last checkpoint.
        value: of the measure of a task that has chosen it, by its name ``chosen_by``; else None.
        reason: why this one, in words.
    """

    step: int
    chosen_by: str | None = None
    loss: float | None = None
    value: float | None = None
    reason: str


class BestMeasure(_Record):
    """The best of what was measured of one thing while the run trained.

    Attributes:
        value: the loss, or the measure of a task.
        step: after which it was measured first. Whether its checkpoint is kept, checkpoint.keep_best decides.
        higher_is_better: whether the highest is the best.
    """

    value: float
    step: int
    higher_is_better: bool


class SetMeasures(_Record):
    """The measures of one validation set.

    Attributes:
        best: after the step of the checkpoint that is tested; None where the run has no record of them.
        last: after the last step; None where the run has no record of them.
    """

    best: Measures | None
    last: Measures | None


class RunResult(_Record):
    """The content of ``results.json``.

    Attributes:
        format_version: of this record.
        created_by: program and version.
        commit: of the checkout that the run was started from, ``-dirty`` where it had changes; None without one.
        config_digest: of the config that trained the last checkpoint, see ``config_digest``.
        model: ``model.kind``.
        parameters: number of trained parameters.
        seeds: the run's seeds, by key of the config.
        train, validation_data, test_data: what each dataset held; sources in their order, sets by name.
        steps: optimizer steps of the run.
        samples: training samples that it has read.
        tokens: tokens of these samples; None of a classification, whose samples have any number of tokens.
        training_seconds: seconds that its steps took, over all its starts, without evaluation and saving. Steps whose
            time no record tells count at the rate of the next one. None without records.
        attention_share: share of training tokens that took attention as the tested checkpoint was reached, mean over
            the routed layers; None without such layers.
        attention_share_of_layers: the same of each layer, fixed ones included.
        shares_from_step: first step of the records that these shares are means of: a tenth of the run's, the last ones
            up to the step of ``best``.
        keep_best: the first name of ``checkpoint.keep_best``, which was asked for.
        best: the checkpoint that was tested.
        validation: measures of each validation set by name.
        tasks: measures of each task of ``evaluation.tasks``, by its name ``eval/TASK``.
        best_of_each: the best loss by the name of each validation set, and the best of each measure of tasks by its
            name ``eval/TASK/METRIC``.
        test: measures of each test set by name, with the weights of ``best``.
    """

    format_version: Literal[1] = FORMAT_VERSION
    created_by: str = f"megachiar {__version__}"
    commit: str | None = None
    config_digest: str
    model: str
    parameters: int
    seeds: dict[str, int]
    train: list[SourceRecord]
    validation_data: dict[str, SourceRecord] = {}
    test_data: dict[str, SourceRecord] = {}
    steps: int = Field(ge=0)
    samples: int
    tokens: int | None
    training_seconds: float | None = None
    attention_share: float | None = None
    attention_share_of_layers: list[float] | None = None
    shares_from_step: int | None = None
    keep_best: str | None = None
    best: BestCheckpoint
    validation: dict[str, SetMeasures] = {}
    tasks: dict[str, SetMeasures] = {}
    best_of_each: dict[str, BestMeasure] = {}
    test: dict[str, Measures] = {}

    def is_of(self, steps: int, keep_best: str | None, test_data: dict[str, SourceRecord]) -> bool:
        """Return whether this is the result of a run of so many steps, chosen and tested on these sets."""
        same_sets = self.test_data.keys() == test_data.keys() and all(
            record.same_data(self.test_data[name]) for name, record in test_data.items()
        )
        return self.steps == steps and self.keep_best == keep_best and same_sets

    def to_json(self) -> bytes:
        """Return the content of ``results.json``, with its seal."""
        return pretty_sealed(without_nan(self.model_dump(mode="json")))


def result_path(run: Path) -> Path:
    """Return the file of the result of the run in folder ``run``."""
    return run / RESULT_FILE


def write_result(run: Path, result: RunResult) -> None:
    """Write ``results.json``, whole or not at all.

    Raises:
        UserError: the disk refuses it.
    """
    write_atomically(result_path(run), result.to_json())


def read_result(run: Path) -> RunResult | None:
    """Return the result of the run in folder ``run``; None if there is none.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    return read_result_file(result_path(run))


def read_result_file(path: Path) -> RunResult | None:
    """Return the result that a file holds; None if there is no file.

    Raises:
        UserError: the file is damaged or cannot be read.
    """
    with disk_errors(path, "read"):
        try:
            content = read_regular(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        return RunResult.model_validate(parse_sealed(content))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
    except ValueError as error:
        problem = str(error)
    raise UserError(path, f"is no result of a run: {problem}", "remove it, and start the run again to measure it anew")


def set_result_aside(run: Path) -> Path | None:
    """Rename the result of a run that goes on: it is that of its first steps; return its new path, None if none was.

    Raises:
        UserError: the system refuses to rename it.
    """
    path = result_path(run)
    try:
        result = read_result(run)
        if result is None:
            return None
        target = path.with_name(f"results_step_{result.steps:08d}.json")
    except UserError:
        target = path.with_name("results_damaged.json")
    with disk_errors(path):
        os.replace(path, target)
        sync_folder(run)
    return target
