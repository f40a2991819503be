"""What a checkpoint is on disk: its names, its record, and how a reader tells a complete one from a damaged one.

    RUN/checkpoints/step_00000250/      one folder a checkpoint
        state.json                          a CheckpointState, with size and checksum of every other file; written last
        config.yaml                         the resolved config of the run that wrote the checkpoint
        weights-p00-t00-d00.safetensors     fp32 weights by name, one file a rank that writes
        optimizer-p00-t00-d00.safetensors   moments, sharded over ranks like the weights (sharded_tensors.py);
                                            absent where weights alone were imported

A run of any layout (pipeline, tensor and data ranks, ZeRO stage, micro-batch size) can continue from a checkpoint.

A checkpoint is complete or absent. Every file is written to ``step_00000250.incomplete``; the folder is renamed when
all ranks are done and the files are on disk. A killed run leaves an ``.incomplete`` folder behind. No run reads it, and
the next run removes it.

The last line of ``state.json`` is its seal, the checksum of all bytes before it. Only files that the record lists are
read. ``find_damage`` compares the record with its seal and the sizes of the files; the checksums of the files are
compared in ``verify.py``. Version 3 of the format has neither checksums nor seal.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from megachiar import __version__
from megachiar.checkpoint.sealing import SEAL, seal_fits, seal_json, sealed_json
from megachiar.config.tasks import MAIN_TASK
from megachiar.data.sampling.history import DataHistory
from megachiar.data.sampling.history_records import SourceRecord
from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.errors import UserError, disk_errors
from megachiar.topology import LaunchError

FORMAT_VERSION: Final = 4
STATE_FILE, CONFIG_FILE = "state.json", "config.yaml"
WEIGHTS_SUFFIX = ".safetensors"
MOMENTS_PREFIX = "optimizer-"
_NAME = re.compile(r"step_(\d{8,18})")


class RecentSteps(BaseModel):
    """The last steps before a checkpoint, by which a run judges the next ones.

    Losses and gradient norms are those of steps whose numbers were finite; they tell a spike.

    Attributes:
        losses: mean cross-entropy of each step, in nats a token, oldest first.
        gradient_norms: global L2 norm of the gradients of each step, oldest first.
        skipped_in_a_row: how many steps up to the checkpoint were left out, one after another.
        skipped_since_record: how many steps were left out that no record of the metrics up to the checkpoint counts.
        spikes_since_record: how many steps were spikes that no record of the metrics up to the checkpoint counts.
        taken_since_record: how many steps were taken that no record of the metrics up to the checkpoint averages.
        loss_since_record: sum of their losses, in nats a token.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[float, ...] = ()
    gradient_norms: tuple[float, ...] = ()
    skipped_in_a_row: int = Field(default=0, ge=0)
    skipped_since_record: int = Field(default=0, ge=0)
    spikes_since_record: int = Field(default=0, ge=0)
    taken_since_record: int = Field(default=0, ge=0)
    loss_since_record: float = 0.0


NO_STEPS = RecentSteps()


class Spent(BaseModel):
    """What a run has spent, in all its starts and with the steps that it rolled back; charts have it as their axis.

    Attributes:
        seconds: from the first step on, with evaluations and saves, but without what a kill took back.
        flops: model FLOPs of the steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    flops: float = Field(default=0.0, ge=0, allow_inf_nan=False)


NOTHING_SPENT = Spent()
SINCE_VERSION_4 = {
    "checksums",
    "validation",
    "maximised",
    "validation_data",
    "auxiliary_samples",
    "went_back_to",
    "recent",
    "spent",
}
"""Fields of a record that version 3 does not have."""


class CheckpointState(BaseModel):
    """The record of a checkpoint, which ``state.json`` holds.

    Attributes:
        format_version: of the folder, see ``FORMAT_VERSION``.
        created_by: program and version that wrote the checkpoint.
        step: optimizer steps taken.
        samples: training samples that all ranks together have consumed; this is the run's position in the data.
        data: sources and order of these samples.
        optimizer_steps: steps that changed the weights; steps that were skipped are not counted.
        loss_scale: fp16 loss scale with its counters; None for other dtypes.
        recent: what the run compares its next steps with; empty in checkpoints before this field.
        spent: what the run has spent up to the checkpoint; nothing in checkpoints before this field.
        layout: layout of the run that wrote the files, as text for people.
        validation: loss in nats a token on validation sets that was measured after this step, by name, and what tasks
            measured, by names such as eval/cloze/acc. A stop puts an evaluation off; its result is added when the run
            goes on.
        maximised: names of ``validation`` of which the highest is the best, as of accuracies of tasks; of the others
            the lowest is. Empty in checkpoints before this field.
        validation_data: what these sets held, by name, and the training sets of auxiliary tasks, by their key in the
            config; empty in checkpoints before this field.
        auxiliary_samples: samples of each auxiliary task of a mixed run that were read, by name; empty in checkpoints
            before this field.
        went_back_to: the step that ``checkpoint.resume`` named in the run that wrote the checkpoint; None if it named
            none.
        files: size in bytes of each file of the folder but ``state.json``, by name.
        checksums: hexadecimal XXH3-128 of each of these files, by name; None in version 3.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[3, 4] = FORMAT_VERSION
    created_by: str = f"megachiar {__version__}"
    step: int = Field(ge=0)
    samples: int = Field(ge=0)
    data: DataHistory
    optimizer_steps: int = Field(ge=0)
    loss_scale: dict[str, float] | None
    recent: RecentSteps = NO_STEPS
    spent: Spent = NOTHING_SPENT
    layout: str
    validation: dict[str, float] = {}
    maximised: tuple[str, ...] = ()
    validation_data: dict[str, SourceRecord] = {}
    auxiliary_samples: dict[str, int] = {}
    went_back_to: int | None = None
    files: dict[str, int]
    checksums: dict[str, str] | None = None

    @model_validator(mode="after")
    def _check_files(self) -> CheckpointState:
        for name in self.files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or name == STATE_FILE:
                raise ValueError(f"files lists {name!r}, which is no file of the folder beside {STATE_FILE}")
        if CONFIG_FILE not in self.files or not self.tensor_files:
            raise ValueError(f"files lists no {CONFIG_FILE} or no weights")
        newer = self.model_fields_set & SINCE_VERSION_4
        if self.format_version == 3 and newer:
            raise ValueError(f"format_version 3 has no {', '.join(sorted(newer))}")
        if self.format_version > 3 and set(self.checksums or {}) != set(self.files):
            raise ValueError("files and checksums do not name the same files")
        return self

    @property
    def tensor_files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return sorted(name for name in self.files if name.endswith(WEIGHTS_SUFFIX))

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer's moments were saved; imported weights have none."""
        return any(name.startswith(MOMENTS_PREFIX) for name in self.tensor_files)

    def classes_of(self, head: str) -> tuple[str, ...] | None:
        """Return the names of the classes that a classification head has learned; None where they are not recorded."""
        if head == MAIN_TASK:
            return self.data.sources[0].classes
        record = self.validation_data.get(f"mixed.tasks.{head}")
        return None if record is None else record.classes

    def to_json(self) -> bytes:
        """Return the content of ``state.json``, with its seal."""
        return sealed_json(self)


def checkpoint_name(step: int) -> str:
    """Return the name of the folder that holds the checkpoint of ``step``."""
    return f"step_{step:08d}"


def checkpoint_step(path: Path) -> int | None:
    """Return the step that the name of a checkpoint's folder tells; None if it is no such name."""
    name = _NAME.fullmatch(path.name)
    return int(name[1]) if name else None


def named_checkpoints(folder: Path) -> list[Path]:
    """Return what is named as a checkpoint in ``folder``, oldest step first, whether it is complete or not.

    Raises:
        UserError: the folder cannot be read. A folder that does not exist holds nothing.
    """
    names: list[str] = []
    with disk_errors(folder, "read"), contextlib.suppress(FileNotFoundError):
        names = os.listdir(folder)
    steps = {folder / name: step for name in names if (step := checkpoint_step(Path(name))) is not None}
    return sorted(steps, key=steps.__getitem__)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in ``folder``, oldest first, without those that ``find_damage`` reports.

    Raises:
        LaunchError: a checkpoint has another version of the format, see ``find_damage``.
    """
    return [path for path in named_checkpoints(folder) if find_damage(path) is None]


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with the record of ``checkpoint`` or the sizes of its files; None if nothing is.

    Raises:
        LaunchError: the checkpoint has another version of the format. A run that ignored it would start over.
    """
    try:
        state = _read_record(checkpoint)
        for name, size in state.files.items():
            _check_size(checkpoint, name, size)
    except Damaged as damage:
        return str(damage)
    return None


def read_state(checkpoint: Path) -> CheckpointState:
    """Return the record of a checkpoint, of which ``find_damage`` reports nothing.

    Raises:
        UserError: the checkpoint is damaged or has another version of the format.
    """
    problem = find_damage(checkpoint)
    if problem is not None:
        raise damaged_checkpoint(checkpoint, problem)
    return _read_record(checkpoint)


def fingerprint_of(checkpoint: Path) -> str:
    """Return the hash of a checkpoint's record, which tells it from another one of the same step.

    Losses on validation sets do not count, since ``add_validation`` may add some later.

    Raises:
        UserError: the record cannot be read.
    """
    with disk_errors(checkpoint, "read"):
        text = read_regular(checkpoint / STATE_FILE)
    try:
        fields = from_json(text)
        rest = {name: value for name, value in fields.items() if name not in ("validation", "maximised", SEAL)}
    except (ValueError, AttributeError):
        raise damaged_checkpoint(checkpoint, f"{STATE_FILE} cannot be read") from None
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def add_validation(checkpoint: Path, losses: Mapping[str, float], maximised: Collection[str] = ()) -> None:
    """Add what was measured after a checkpoint was written to its record: losses on validation sets, measures of tasks.

    Nothing else in the record changes. One of version 3 has no losses, and none are added.

    Args:
        checkpoint: with a record of which ``find_damage`` reports nothing.
        losses: in nats a token, by name of the set; or measures of tasks by name.
        maximised: the names of those of which the highest is the best.

    Raises:
        UserError: the record is damaged, or the disk refuses the new one; the old one stays.
    """
    if read_state(checkpoint).format_version < FORMAT_VERSION:
        return
    path = checkpoint / STATE_FILE
    with disk_errors(path, "read"):
        fields = from_json(read_regular(path))
    del fields[SEAL]
    fields["validation"] = {**fields.get("validation", {}), **losses}
    fields["maximised"] = sorted({*fields.get("maximised", []), *(name for name in losses if name in maximised)})
    write_atomically(path, seal_json(json.dumps(fields, indent=2)))


def damaged_checkpoint(checkpoint: Path, problem: str) -> UserError:
    """Return the error for a checkpoint that was named, and is damaged."""
    return UserError(checkpoint, f"is not a whole checkpoint: {problem}", "use another checkpoint of the run")


def unlisted_files(checkpoint: Path, state: CheckpointState) -> list[str]:
    """Return the names of files in the folder of a checkpoint that its record does not list, and nobody reads."""
    files = (str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if not path.is_dir())
    return sorted(name for name in files if name != STATE_FILE and name not in state.files)


class Damaged(Exception):
    """A checkpoint cannot be used; the message begins with the name of the file that is damaged."""


def _read_record(checkpoint: Path) -> CheckpointState:
    """Read and check ``state.json``.

    Raises:
        Damaged: the file is missing, unreadable or altered, or belongs to another folder.
        LaunchError: it has another version of the format.
    """
    try:
        text = read_regular(checkpoint / STATE_FILE)
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(f"{STATE_FILE} is missing") from None
    except OSError as error:
        raise Damaged(f"{STATE_FILE} cannot be read: {error.strerror or error}") from None
    fits = seal_fits(text)
    if fits is False:
        raise Damaged(f"{STATE_FILE} was altered: its seal does not fit its content")
    try:
        record = from_json(text)
        _refuse_other_format(checkpoint, record)
        if fits:
            del record[SEAL]
        state = CheckpointState.model_validate(record)
    except UserError:
        raise
    except ValueError as error:
        raise Damaged(f"{STATE_FILE} cannot be read: {_first_problem(error)}") from None
    if bool(fits) != (state.format_version > 3):
        raise Damaged(f"{STATE_FILE} was altered: its seal does not fit format_version {state.format_version}")
    if checkpoint_step(checkpoint) not in (None, state.step):
        raise Damaged(f"{STATE_FILE} is the record of step {state.step}, not of this folder")
    return state


def _refuse_other_format(checkpoint: Path, record: Any) -> None:
    version = record.get("format_version") if isinstance(record, dict) else None
    if type(version) is int and version not in (3, FORMAT_VERSION):
        raise LaunchError(
            checkpoint / STATE_FILE,
            f"has format_version {version}, written by {record.get('created_by')}; this is megachiar {__version__}, "
            f"which reads format_version 3 and {FORMAT_VERSION}",
            "use the version that wrote the checkpoint; or leave it: name another logging.folder, or another "
            "checkpoint.load_from where that names it",
        )


def _check_size(checkpoint: Path, name: str, size: int) -> None:
    path = checkpoint / name
    try:
        if not path.exists():
            raise Damaged(f"{name} is missing")
        if not path.is_file():
            raise Damaged(f"{name} is no regular file")
        found = path.stat().st_size
    except OSError as error:
        raise Damaged(f"{name} cannot be read: {error.strerror}") from None
    except ValueError:  # a null byte in the name
        raise Damaged(f"{STATE_FILE} lists {name!r}, which is no name of a file") from None
    if found != size:
        raise Damaged(f"{name} has {found} bytes, but {size} were written")


def _first_problem(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
    return str(error).splitlines()[0]
