"""Find a checkpoint that is whole, and read its tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megachiar.checkpoint.format import (
    STATE_FILE,
    checkpoint_name,
    checkpoint_step,
    complete_checkpoints,
    damaged_checkpoint,
    find_damage,
    named_checkpoints,
    read_state,
)
from megachiar.checkpoint.sharded_tensors import ShardReader
from megachiar.checkpoint.verify import Verify, verify_alone
from megachiar.engine.optimizer import MOMENTS
from megachiar.errors import UserError, disk_errors

_TOLD = 3  # damaged checkpoints that a message describes
Log = Callable[[str], None]
"""Prints a line of the log."""


def _silent(line: str) -> None:
    """Print nothing."""


def newest_whole(folder: Path, verify: Verify = verify_alone, log: Log = _silent) -> Path | None:
    """Return the newest whole checkpoint in ``folder``; None if nothing there is named as a checkpoint.

    Args:
        folder: of a run's checkpoints.
        verify: compares contents with checksums.
        log: is told of each checkpoint that is passed over, and why.

    Raises:
        UserError: there are checkpoints, and none is whole. A run that went on would silently start over.
        LaunchError: a checkpoint has another version of the format.
    """
    named = named_checkpoints(folder)[::-1]
    problems = {path: find_damage(path) for path in named}
    for path in named:
        problems[path] = problem = problems[path] or verify(path)
        if problem is None:
            return path
        log(f"passed over {path}, because {problem}")
    if not named:
        return None
    told = [f"{path.name}: {why}" for path, why in problems.items()][:_TOLD]
    more = f"; and {len(named) - _TOLD} more" if len(named) > _TOLD else ""
    raise UserError(
        folder,
        f"none of its checkpoints is whole: {'; '.join(told)}{more}",
        "put back an undamaged copy of one, or name another run folder; to start over here, move these away",
    )


def checkpoint_to_go_back_to(folder: Path, step: int, verify: Verify = verify_alone, log: Log = _silent) -> Path:
    """Return where a run starts that ``checkpoint.resume`` tells to go back to ``step``.

    That is the checkpoint of ``step``. Once the run has gone back and saved since, it is the newest whole checkpoint:
    a run that is started again with the same setting goes on.

    Raises:
        UserError: the checkpoint of ``step`` is not there, or not whole.
    """
    complete = complete_checkpoints(folder)
    if complete and read_state(complete[-1]).went_back_to == step:
        newest = newest_whole(folder, verify, log)
        if newest is not None:
            return newest
    path = folder / checkpoint_name(step)
    problem = (find_damage(path) or verify(path)) if path.exists() else "it is not there"
    if problem is None:
        return path
    raise UserError(
        f"checkpoint.resume {step}",
        f"{path} is not a whole checkpoint: {problem}",
        "`megachiar checkpoint list` names the steps that were saved",
    )


def later_checkpoints(folder: Path, step: int) -> list[Path]:
    """Return what is named as a checkpoint of a later step in ``folder``, whether it is complete or not."""
    return [path for path in named_checkpoints(folder) if (checkpoint_step(path) or 0) > step]


def locate_checkpoint(path: Path | str, verify: Verify = verify_alone, log: Log = _silent) -> Path:
    """Return the checkpoint at ``path``, or the newest whole one of the run folder at ``path``.

    Args:
        path: run folder, its folder of checkpoints, or one checkpoint.
        verify: compares contents with checksums.
        log: is told of each checkpoint that is passed over, and why.

    Raises:
        UserError: there is no whole checkpoint at ``path``.
    """
    path = Path(path)
    if is_checkpoint(path):
        problem = find_damage(path) or verify(path)
        if problem is not None:
            raise damaged_checkpoint(path, problem)
        return path
    for folder in folders_of_checkpoints(path):
        if found := newest_whole(folder, verify, log):
            return found
    raise no_checkpoint(path)


def locate_step(path: Path | str, step: int | None, verify: Verify = verify_alone, log: Log = _silent) -> Path:
    """Return the checkpoint of ``step`` of the run at ``path``, or what ``locate_checkpoint`` finds if that is None.

    Raises:
        UserError: there is no whole checkpoint of this step.
    """
    path = Path(path)
    if step is None:
        return locate_checkpoint(path, verify, log)
    if is_checkpoint(path):
        if checkpoint_step(path) == step:
            return locate_checkpoint(path, verify, log)
        raise UserError(f"--step {step}", f"{path} is one checkpoint, of another step", "name its run folder")
    for folder in folders_of_checkpoints(path):
        if (folder / checkpoint_name(step)).exists():
            return locate_checkpoint(folder / checkpoint_name(step), verify, log)
    saved = [
        checkpoint_step(found) for folder in folders_of_checkpoints(path) for found in complete_checkpoints(folder)
    ]
    if not saved:
        raise no_checkpoint(path)
    raise UserError(f"--step {step}", f"{path} has no checkpoint of this step", f"it has {_listed(saved)}")


def _listed(steps: Sequence[int | None]) -> str:
    """Return steps as a message has them, at most ten of them."""
    shown = [f"{step}" for step in steps]
    return ", ".join(shown if len(shown) <= 10 else [*shown[:5], "...", *shown[-4:]])


def is_checkpoint(path: Path) -> bool:
    """Return whether ``path`` is meant as one checkpoint, whole or not, and not as a run folder.

    Raises:
        UserError: the system refuses to look at it.
    """
    with disk_errors(path, "read"):
        return (path / STATE_FILE).exists() or (path.exists() and checkpoint_step(path) is not None)


def folders_of_checkpoints(path: Path) -> tuple[Path, Path]:
    """Return where the checkpoints of the run folder ``path`` may be; it may be their folder itself."""
    return path / "checkpoints", path


def no_checkpoint(path: Path) -> UserError:
    """Return the error for a path at which there is no checkpoint."""
    problem = "holds no checkpoint" if path.is_dir() else "no such folder"
    return UserError(path, problem, "give a run folder (logging.folder of its config) or one of its checkpoints")


def open_tensors(checkpoint: Path) -> ShardReader:
    """Return a reader of the tensors of a checkpoint that was verified.

    Raises:
        UserError: the checkpoint is damaged.
    """
    return ShardReader(checkpoint, read_state(checkpoint).tensor_files)


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return whole fp32 weights and buffers by name, on the CPU, of a checkpoint of any layout that was verified.

    Raises:
        UserError: the checkpoint is damaged.
    """
    reader = open_tensors(checkpoint)
    return {name: reader.whole(name) for name in reader.names() if not name.endswith(MOMENTS)}
