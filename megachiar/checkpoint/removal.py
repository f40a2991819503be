"""Remove checkpoints so that a kill in the middle leaves none that is whole in part."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from megachiar.checkpoint.format import checkpoint_step, complete_checkpoints
from megachiar.checkpoint.reading import newest_whole
from megachiar.data.storage.files import sync_folder
from megachiar.errors import UserError, disk_errors


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint.

    It is renamed first: nobody reads an ``.incomplete`` folder, and the next save removes it.

    Raises:
        UserError: the folder cannot be renamed.
    """
    doomed = path.with_name(path.name + ".incomplete")
    shutil.rmtree(doomed, ignore_errors=True)
    with disk_errors(path):
        os.replace(path, doomed)
        sync_folder(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def to_prune(
    folder: Path, *, keep: int | None = None, keep_every: int | None = None, steps: Collection[int] = ()
) -> list[Path]:
    """Return the checkpoints in ``folder`` that a rule removes, oldest first; the newest whole one is never among them.

    Args:
        folder: of a run's checkpoints.
        keep: the newest so many complete checkpoints stay; None counts none.
        keep_every: complete checkpoints whose step is a multiple of this stay; None means none.
        steps: remove exactly these steps, damaged or not, instead of following the other two.

    Raises:
        UserError: a step of ``steps`` is not there or is the newest whole one, or no checkpoint is whole.
    """
    newest = newest_whole(folder)
    if steps:
        return [_named(folder, step, newest) for step in sorted(set(steps))]
    complete = complete_checkpoints(folder)
    stays = {newest, *(complete[-keep:] if keep else ())}
    return [p for p in complete if p not in stays and not is_multiple(checkpoint_step(p), keep_every)]


def is_multiple(step: int | None, keep_every: int | None) -> bool:
    """Return whether ``step`` is one that ``keep_every`` keeps."""
    return step is not None and keep_every is not None and step % keep_every == 0


def _named(folder: Path, step: int, newest: Path | None) -> Path:
    found = [path for path in folder.iterdir() if checkpoint_step(path) == step] if folder.is_dir() else []
    if not found:
        raise UserError(folder, f"holds no checkpoint of step {step}", "`megachiar checkpoint list` names them")
    if found[0] == newest:
        raise UserError(found[0], "is the newest whole checkpoint, which is never removed", "leave this step out")
    return found[0]
