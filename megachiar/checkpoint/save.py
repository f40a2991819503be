"""Write a checkpoint that is complete or absent, and remove the oldest ones."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import ChainMap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megachiar.checkpoint.checksums import FileRecord, write_checksummed
from megachiar.checkpoint.format import CONFIG_FILE, STATE_FILE, CheckpointState, checkpoint_name, complete_checkpoints
from megachiar.checkpoint.removal import remove_checkpoint
from megachiar.checkpoint.sharded_tensors import ShardWriter
from megachiar.data.sampling.history import DataHistory
from megachiar.data.storage.files import sync_folder, write_atomically
from megachiar.engine.deepspeed_patches import loss_scale_state
from megachiar.engine.engine import Engine
from megachiar.engine.gathered_state import gather_state
from megachiar.errors import UserError, disk_errors


def save_checkpoint(engine: Engine, step: int, data: DataHistory, keep: int | None) -> Path:
    """Write the checkpoint of ``step`` and remove old ones; every rank calls this function.

    Args:
        engine: holds weights, optimizer state and loss scale.
        step: optimizer steps taken.
        data: what the run has read so far.
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
        written = _write_tensors(engine, incomplete)
    shares: list[Any] = [None] * topology.world_size
    dist.all_gather_object(shares, written, group=engine.control)
    if topology.is_main:
        with disk_errors(folder):
            config_record = write_checksummed(incomplete / CONFIG_FILE, config.to_yaml().encode())
            records = dict(sorted({CONFIG_FILE: config_record, **ChainMap(*shares)}.items()))
            state = CheckpointState(
                step=step,
                samples=data.samples_before(step),
                data=data,
                optimizer_steps=step - engine.skipped_steps,
                loss_scale=loss_scale_state(engine.deepspeed),
                layout=topology.describe() + f", ZeRO {config.parallel.zero_stage}, {config.precision.compute}",
                files={name: record.size for name, record in records.items()},
                checksums={name: record.checksum for name, record in records.items()},
            )
            write_atomically(incomplete / STATE_FILE, state.to_json())
            _replace_folder(incomplete, final)
        _remove_oldest(folder, keep)
    engine.barrier()
    return final


def _write_tensors(engine: Engine, folder: Path) -> dict[str, FileRecord]:
    """Write this rank's share of weights, moments and buffers; every rank calls this function."""
    writer = ShardWriter(engine.topology)
    mine = False
    for tensor in gather_state(engine):
        if tensor.moment is None:
            mine = writer.is_mine(tensor.shard)
        if mine:
            writer.add(tensor.name, tensor.moment, tensor.value, tensor.shard)
    return writer.write(folder)


def _replace_folder(incomplete: Path, final: Path) -> None:
    if final.exists():  # the run fell back to an older checkpoint and reached this step again
        shutil.rmtree(final)
    os.replace(incomplete, final)
    sync_folder(final.parent)


def _remove_oldest(folder: Path, keep: int | None) -> None:
    if keep is not None:
        for path in complete_checkpoints(folder)[:-keep]:
            remove_checkpoint(path)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob("step_*.incomplete"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a ``UserError`` and remove ``folder``."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(folder.parent).free
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            folder,
            f"the checkpoint could not be written ({free / 2**20:,.0f} MiB free): {error.strerror or error}",
            "free some space, lower checkpoint.keep, or move logging.folder; the run resumes from its last checkpoint",
        ) from error
