"""Look at checkpoints without a model: list them, describe their tensors, and tell two of them apart."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megachiar.checkpoint.format import STATE_FILE, checkpoint_step, find_damage, named_checkpoints, read_state
from megachiar.checkpoint.reading import folders_of_checkpoints, is_checkpoint, no_checkpoint, open_tensors
from megachiar.errors import UserError


@dataclass(frozen=True)
class CheckpointSummary:
    """One line of a list of checkpoints.

    Attributes:
        path: its folder.
        step: of the folder's name; None for a folder of another name.
        written: when its record was written; None without one.
        size: bytes of all listed files; None where the record cannot be read.
        layout: of the run that wrote it; None where the record cannot be read.
        problem: what is wrong with record or sizes; None if nothing is.
    """

    path: Path
    step: int | None
    written: datetime.datetime | None
    size: int | None
    layout: str | None
    problem: str | None


@dataclass(frozen=True)
class TensorSummary:
    """A tensor of a checkpoint: its name, its shape, its type such as ``float32``, and its Euclidean norm."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor differs between two checkpoints.

    Attributes:
        name: of the tensor.
        problem: why the two cannot be subtracted: one is missing, or their shapes differ; None if they can.
        largest: largest absolute difference of two elements.
        relative: norm of the difference, divided by the norm of the first tensor.
    """

    name: str
    problem: str | None = None
    largest: float = 0.0
    relative: float = 0.0


def checkpoints_at(path: Path) -> list[Path]:
    """Return the checkpoint at ``path``, or all that are named as one in the run folder at ``path``, oldest first.

    Raises:
        UserError: there is none.
    """
    if is_checkpoint(path):
        return [path]
    for folder in folders_of_checkpoints(path):
        if found := named_checkpoints(folder):
            return found
    raise no_checkpoint(path)


def summarise(checkpoint: Path) -> CheckpointSummary:
    """Describe a checkpoint from its record and the sizes of its files; no other file is read."""
    problem = damage_or_version(checkpoint)
    state = read_state(checkpoint) if problem is None else None
    record = checkpoint / STATE_FILE
    return CheckpointSummary(
        path=checkpoint,
        step=state.step if state else checkpoint_step(checkpoint),
        written=datetime.datetime.fromtimestamp(record.stat().st_mtime) if record.exists() else None,
        size=sum(state.files.values()) if state else None,
        layout=state.layout if state else None,
        problem=problem,
    )


def damage_or_version(checkpoint: Path) -> str | None:
    """Return what ``find_damage`` reports, or which version of the format the checkpoint has that is not known."""
    try:
        return find_damage(checkpoint)
    except UserError as error:
        return f"{STATE_FILE} {error.problem}"


def describe_tensors(checkpoint: Path) -> Iterator[TensorSummary]:
    """Yield every weight, buffer and moment of a verified checkpoint by name; one at a time is in memory."""
    reader = open_tensors(checkpoint)
    for name in sorted(reader.names()):
        tensor = reader.whole(name)
        yield TensorSummary(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), _norm(tensor))


def compare(one: Path, other: Path) -> Iterator[TensorDifference | None]:
    """Yield for each tensor of two verified checkpoints how it differs, None where all bits are equal.

    The checkpoints may have been written by runs of different layouts. One tensor of each is in memory.
    """
    ours, theirs = open_tensors(one), open_tensors(other)
    known_to_us, known_to_them = set(ours.names()), set(theirs.names())
    for name in sorted(known_to_us | known_to_them):
        if name not in known_to_them:
            yield TensorDifference(name, problem="is in the first alone")
        elif name not in known_to_us:
            yield TensorDifference(name, problem="is in the second alone")
        else:
            yield _difference(name, ours.whole(name), theirs.whole(name))


def _difference(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> TensorDifference | None:
    if ours.shape != theirs.shape:
        return TensorDifference(name, problem=f"has shape {tuple(ours.shape)} and {tuple(theirs.shape)}")
    if torch.equal(ours.view(torch.int32), theirs.view(torch.int32)):
        return None
    norm = _norm(ours)
    change = ours.sub_(theirs)
    relative = _norm(change) / norm if norm else float("inf")
    return TensorDifference(name, largest=change.abs_().max().item(), relative=relative)


def _norm(tensor: torch.Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
