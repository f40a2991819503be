"""Write a checkpoint that is complete or absent, and remove the ones that no rule keeps.

    every rank      write its files to step_N.incomplete, with checksums, and force them to the disk
    rank 0          write config.yaml and the sealed state.json, rename the folder to step_N
    rank 0          remove old checkpoints; what cannot be removed is a warning, since the new one is good

After the first two lines all ranks agree whether it went well everywhere. They talk over a function that is passed in,
so that this may run in a thread beside training (``saver.py``).
"""

from __future__ import annotations

import os
import shutil
import socket
from collections import ChainMap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megachiar.checkpoint.checksums import FileRecord, write_checksummed
from megachiar.checkpoint.format import CONFIG_FILE, STATE_FILE, checkpoint_name, checkpoint_step
from megachiar.checkpoint.removal import discard, remove_checkpoint, surplus_checkpoints
from megachiar.checkpoint.snapshot import Snapshot
from megachiar.config.sections import CheckpointConfig
from megachiar.data.storage.files import sync_folder, write_atomically
from megachiar.errors import UserError, disk_errors
from megachiar.topology import LaunchError

Gather = Callable[[Any], list[Any]]
"""Returns the values of all ranks, rank 0's first; every rank calls it."""


class SaveError(LaunchError):
    """A checkpoint could not be written, on every rank alike."""


def write_checkpoint(snapshot: Snapshot, gather: Gather, is_main: bool) -> Path:
    """Write the checkpoint of ``snapshot``; every rank calls this function.

    Returns:
        The folder of the new checkpoint.

    Raises:
        SaveError: the disk of any rank is full or refuses to be written. Every rank raises it, and no folder that looks
            like a complete checkpoint is left.
    """
    final = snapshot.folder / checkpoint_name(snapshot.step)
    incomplete = final.with_name(final.name + ".incomplete")
    writer = _AgreedWriter(snapshot.folder, incomplete, gather, is_main)
    sizes = gather(snapshot.shards.size)
    writer.step(lambda: _prepare(snapshot.folder, sum(sizes)) if is_main else None)
    shares = writer.step(lambda: _write_share(snapshot, incomplete))
    writer.step(lambda: _publish(snapshot, ChainMap(*shares), incomplete, final) if is_main else None)
    return final


class _AgreedWriter:
    """Take the steps of a save, each on all ranks, and fail on all ranks if one of them fails."""

    def __init__(self, folder: Path, incomplete: Path, gather: Gather, is_main: bool):
        self._folder, self._incomplete, self._gather, self._is_main = folder, incomplete, gather, is_main

    def step(self, action: Callable[[], Any]) -> list[Any]:
        """Return what ``action`` returns on each rank.

        Raises:
            SaveError: it failed on some rank because of the disk.
        """
        value: Any = None
        error: UserError | None = None
        defect: Exception | None = None
        try:
            with disk_errors(self._incomplete):
                value = action()
        except UserError as refused:
            error = refused
        except Exception as found:  # a defect of ours: this rank raises it, and the others must not wait
            error, defect = UserError(self._incomplete, f"saving failed: {found!r}", "report it"), found
        reports = self._gather((socket.gethostname(), value, error))
        failures = [(rank, host, failed) for rank, (host, _, failed) in enumerate(reports) if failed is not None]
        if not failures:
            return [value for _, value, _ in reports]
        if self._is_main:
            discard(self._incomplete)
        if defect is not None:
            raise defect
        rank, host, first = failures[0]
        who = f"rank {rank} on {host}: " if len(reports) > 1 else ""
        raise SaveError(
            f"{who}{first.where}",
            f"the checkpoint could not be written ({self._free_mib()} MiB free): {first.problem}",
            f"{first.remedy}; or lower checkpoint.keep. The run resumes from its last checkpoint",
        )

    def _free_mib(self) -> str:
        try:
            return f"{shutil.disk_usage(self._folder).free / 2**20:,.0f}"
        except OSError:
            return "?"


def _prepare(folder: Path, size: int) -> None:
    """Make the folder of checkpoints, remove what killed saves left there, and check that ``size`` bytes fit."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("step_*.incomplete"):
        discard(path)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            folder,
            f"the checkpoint needs {size / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free",
            "free some space there or write somewhere else",
        )


def _write_share(snapshot: Snapshot, incomplete: Path) -> dict[str, FileRecord]:
    incomplete.mkdir(parents=True, exist_ok=True)
    return snapshot.shards.write(incomplete)


def _publish(snapshot: Snapshot, shares: ChainMap[str, FileRecord], incomplete: Path, final: Path) -> None:
    """Write config and record, and give the folder its name."""
    config = write_checksummed(incomplete / CONFIG_FILE, snapshot.config.to_yaml().encode())
    state = snapshot.record({CONFIG_FILE: config, **shares})
    write_atomically(incomplete / STATE_FILE, state.to_json())
    replaced = final.with_name(final.name + ".replaced.incomplete")
    if final.exists():  # the run fell back to an older checkpoint and reached this step again
        os.replace(final, replaced)
    os.replace(incomplete, final)
    sync_folder(final.parent)
    discard(replaced)


def remove_surplus(saved: Path, rules: CheckpointConfig, spared: str | None = None) -> list[str]:
    """Remove the checkpoints that no rule keeps once another one is saved.

    Args:
        saved: the checkpoint that the run has just saved.
        rules: what stays.
        spared: name of a checkpoint that stays as well.

    Returns:
        A line for the log for each failure.
    """
    folder, step = saved.parent, checkpoint_step(saved)
    warnings = []
    try:
        for path in surplus_checkpoints(folder, rules.keep, rules.keep_every, rules.best_of, spared, step):
            try:
                remove_checkpoint(path)
            except UserError as error:
                warnings.append(f"{path} was not removed, and takes space: {error}")
    except UserError as error:
        warnings.append(f"no old checkpoint of {folder} was removed: {error}")
    return warnings
