"""Write a checkpoint that is complete or absent, and remove the oldest ones."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from megachiar.checkpoint.format import (
    CONFIG_FILE,
    STATE_FILE,
    CheckpointState,
    RecentSteps,
    checkpoint_name,
    complete_checkpoints,
)
from megachiar.checkpoint.sharded_tensors import ShardWriter
from megachiar.data.sampling.history import DataHistory
from megachiar.data.storage.files import sync_folder, write_atomically
from megachiar.engine.deepspeed_patches import loss_scale_state
from megachiar.engine.engine import Engine
from megachiar.engine.gathered_state import gather_state
from megachiar.errors import UserError, disk_errors


def save_checkpoint(engine: Engine, step: int, data: DataHistory, recent: RecentSteps, keep: int | None) -> Path:
    """Write the checkpoint of ``step`` and remove old ones; every rank calls this function.

    Args:
        engine: holds weights, optimizer state and loss scale.
        step: optimizer steps taken.
        data: what the run has read so far.
        recent: what the run compares its next steps with.
        keep: number of newest checkpoints that remain; None keeps all.

    Returns:
        The folder of the new checkpoint.

    Raises:
        UserError: the disk is full or read-only. No folder that looks like a complete checkpoint is left.
    """
    config, topology = engine.config, engine.topology
    folder = config.checkpoint_folder
    final, incomplete = folder / checkpoint_name(step), folder / f"{checkpoint_name(step)}.incomplete"
    if topology.is_main:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
    engine.barrier()
    with _write_errors(incomplete):
        incomplete.mkdir(exist_ok=True)
        _write_tensors(engine, incomplete)
    engine.barrier()
    if topology.is_main:
        with disk_errors(folder):
            (incomplete / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
            state = CheckpointState(
                step=step,
                samples=data.samples_before(step),
                data=data,
                optimizer_steps=step - engine.skipped_steps,
                loss_scale=loss_scale_state(engine.deepspeed),
                recent=recent,
                layout=topology.describe() + f", ZeRO {config.parallel.zero_stage}, {config.precision.compute}",
                files=_sync_files(incomplete),
            )
            write_atomically(incomplete / STATE_FILE, (state.model_dump_json(indent=2) + "\n").encode())
            _replace_folder(incomplete, final)
        _remove_oldest(folder, keep)
    engine.barrier()
    return final


def _write_tensors(engine: Engine, folder: Path) -> None:
    """Write this rank's share of weights, moments and buffers; every rank calls this function."""
    writer = ShardWriter(engine.topology)
    mine = False
    for tensor in gather_state(engine):
        if tensor.moment is None:
            mine = writer.is_mine(tensor.shard)
        if mine:
            writer.add(tensor.name, tensor.moment, tensor.value, tensor.shard)
    writer.write(folder)


def _sync_files(folder: Path) -> dict[str, int]:
    """Force every file of ``folder`` to the disk; return the files' sizes in bytes by name."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            sizes[str(path.relative_to(folder))] = path.stat().st_size
    return sizes


def _replace_folder(incomplete: Path, final: Path) -> None:
    if final.exists():  # the run fell back to an older checkpoint and reached this step again
        shutil.rmtree(final)
    os.replace(incomplete, final)
    sync_folder(final.parent)


def _remove_oldest(folder: Path, keep: int | None) -> None:
    if keep is not None:
        for path in complete_checkpoints(folder)[:-keep]:
            # The folder is renamed first: a kill in the middle must not leave one that looks like a checkpoint.
            doomed = path.with_name(path.name + ".incomplete")
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob("step_*.incomplete"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a ``UserError`` and remove ``folder``.

    safetensors wraps the system's error in its own, so that both kinds are caught here.
    """
    try:
        with disk_errors(folder):
            yield
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    except SafetensorError as error:
        free = shutil.disk_usage(folder.parent).free
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            folder,
            f"the checkpoint could not be written ({free / 2**20:,.0f} MiB free): {str(error).splitlines()[0]}",
            "free some space, lower checkpoint.keep, or move logging.folder; the run resumes from its last checkpoint",
        ) from error
