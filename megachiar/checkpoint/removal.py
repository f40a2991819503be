"""Remove checkpoints so that a kill in the middle leaves none that is whole in part."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from megachiar.checkpoint.format import checkpoint_step, complete_checkpoints, read_state
from megachiar.checkpoint.reading import later_checkpoints, newest_whole
from megachiar.data.storage.files import sync_folder
from megachiar.errors import UserError, disk_errors

_SET_ASIDE = ".set_aside"


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint.

    It is renamed first: nobody reads an ``.incomplete`` folder, and the next save removes it.

    Raises:
        UserError: the folder cannot be renamed or removed.
    """
    doomed = path.with_name(path.name + ".incomplete")
    discard(doomed)
    with disk_errors(path):
        os.replace(path, doomed)
        sync_folder(path.parent)
        if doomed.is_symlink():  # what it leads to is somebody else's
            doomed.unlink()
        else:
            shutil.rmtree(doomed)


def discard(path: Path) -> None:
    """Remove a folder, or what stands in the way of one; what cannot be removed does no harm.

    Of a link the link itself is removed, not what it leads to: the next save would write through it.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def set_aside(path: Path) -> Path:
    """Give a checkpoint a name that no run reads, ``step_N.set_aside``, and return it. Nothing removes it.

    Raises:
        UserError: the folder cannot be renamed.
    """
    names = (f"{path.name}{_SET_ASIDE}{f'-{count}' if count else ''}" for count in itertools.count())
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    with disk_errors(path):
        os.replace(path, target)
        sync_folder(path.parent)
    return target


def named_or_set_aside(folder: Path, name: str) -> list[Path]:
    """Return what is called ``name`` in ``folder``, and what has had that name and was set aside."""
    return [path for path in (folder / name, *sorted(folder.glob(f"{name}{_SET_ASIDE}*"))) if path.exists()]


def surplus_checkpoints(
    folder: Path,
    keep: int | None,
    keep_every: int | None = None,
    keep_best: Collection[str] = (),
    spared: str | None = None,
    up_to: int | None = None,
) -> list[Path]:
    """Return the complete checkpoints in ``folder`` that no rule keeps, oldest first.

    Args:
        folder: of a run's checkpoints.
        keep: the newest so many stay; None keeps all.
        keep_every: those whose step is a multiple of this stay as well.
        keep_best: names of validation sets and of what tasks measure; the best one of each stays as well.
        spared: name of a checkpoint that stays as well.
        up_to: step of a run that has just saved. Later checkpoints are not of this run, or were passed over as damaged:
            they stay, and do not count as the newest.
    """
    if keep is None:
        return []
    later = set(later_checkpoints(folder, up_to)) if up_to is not None else set()
    complete = [path for path in complete_checkpoints(folder) if path not in later]
    best = (best_checkpoint(complete, name) for name in keep_best)
    stays = {*complete[-keep:], *best, folder / spared if spared else None}
    return [path for path in complete if path not in stays and not _is_multiple(path, keep_every)]


def best_checkpoint(checkpoints: Sequence[Path], validation_set: str | None) -> Path | None:
    """Return the checkpoint with the lowest recorded loss on a validation set, the newest of equals.

    Losses on other data than the newest checkpoint has under that name do not count. The name may be that of what a
    task measures, too, of which the lowest or the highest value is the best. None if no checkpoint has a loss on the
    set, or no set is named.
    """
    if validation_set is None or not checkpoints:
        return None
    states = {path: read_state(path) for path in checkpoints}
    now = states[checkpoints[-1]].validation_data.get(validation_set)
    losses: dict[Path, float] = {}
    for path, state in states.items():
        loss, then = state.validation.get(validation_set), state.validation_data.get(validation_set)
        if loss is not None and (now is None or then is None or now.same_data(then)):
            losses[path] = loss
    is_maximised = any(validation_set in state.maximised for state in states.values())
    return min(reversed(losses), key=lambda path: -losses[path] if is_maximised else losses[path], default=None)


def to_prune(
    folder: Path,
    *,
    keep: int | None = None,
    keep_every: int | None = None,
    keep_best: Collection[str] = (),
    steps: Collection[int] = (),
) -> list[Path]:
    """Return the checkpoints in ``folder`` that a rule removes, oldest first; the newest whole one is never among them.

    Args:
        folder: of a run's checkpoints.
        keep, keep_every, keep_best: see ``surplus_checkpoints``; without ``keep`` only the other two count.
        steps: remove exactly these steps, damaged or not, instead of following the rules.

    Raises:
        UserError: a step of ``steps`` is not there or is the newest whole one, or no checkpoint is whole.
    """
    newest = newest_whole(folder)
    if steps:
        return [_named(folder, step, newest) for step in sorted(set(steps))]
    return [path for path in surplus_checkpoints(folder, keep or 1, keep_every, keep_best) if path != newest]


def _is_multiple(path: Path, keep_every: int | None) -> bool:
    step = checkpoint_step(path)
    return step is not None and keep_every is not None and step % keep_every == 0


def _named(folder: Path, step: int, newest: Path | None) -> Path:
    found = [path for path in folder.iterdir() if checkpoint_step(path) == step] if folder.is_dir() else []
    if not found:
        raise UserError(folder, f"holds no checkpoint of step {step}", "`megachiar checkpoint list` names them")
    if found[0] == newest:
        raise UserError(found[0], "is the newest whole checkpoint, which is never removed", "leave this step out")
    return found[0]
