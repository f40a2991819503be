"""Write a checkpoint of a run, whole or not at all, and remove the oldest ones."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from megachiar.checkpoint.format import CONFIG_FILE, STATE_FILE, CheckpointState, checkpoint_name, complete_checkpoints
from megachiar.checkpoint.sharded_tensors import ShardWriter
from megachiar.data.sampling.history import DataHistory
from megachiar.data.storage.files import sync_folder, write_atomically
from megachiar.engine.deepspeed_patches import loss_scale_state
from megachiar.engine.engine import Engine
from megachiar.engine.gathered_state import gather_state
from megachiar.errors import UserError, disk_errors


def save_checkpoint(engine: Engine, step: int, data: DataHistory, keep: int | None) -> Path:
    """Write a checkpoint of a run that has read ``data``; every rank calls it. Afterwards the ``keep`` newest remain.

    Raises:
        UserError: the disk is full or read-only; no folder that looks whole is left.
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
                layout=topology.describe() + f", ZeRO {config.parallel.zero_stage}, {config.precision.compute}",
                files=_sync_files(incomplete),
            )
            write_atomically(incomplete / STATE_FILE, (state.model_dump_json(indent=2) + "\n").encode())
            _replace_folder(incomplete, final)
        _remove_oldest(folder, keep)
    engine.barrier()
    return final


def _write_tensors(engine: Engine, folder: Path) -> None:
    """Write this rank's share of weights, moments and buffers; every rank calls it."""
    writer = ShardWriter(engine.topology)
    mine = False
    for tensor in gather_state(engine):
        if tensor.moment is None:
            mine = writer.is_mine(tensor.shard)
        if mine:
            writer.add(tensor.name, tensor.moment, tensor.value, tensor.shard)
    writer.write(folder)


def _sync_files(folder: Path) -> dict[str, int]:
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            sizes[str(path.relative_to(folder))] = path.stat().st_size
    return sizes


def _replace_folder(incomplete: Path, final: Path) -> None:
    if final.exists():  # the same step once more, after falling back to an older checkpoint
        shutil.rmtree(final)
    os.replace(incomplete, final)
    sync_folder(final.parent)


def _remove_oldest(folder: Path, keep: int | None) -> None:
    if keep is not None:
        for path in complete_checkpoints(folder)[:-keep]:
            # Renamed first: a kill in the middle must not leave a folder that looks like a checkpoint.
            doomed = path.with_name(path.name + ".incomplete")
            os.replace(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob("step_*.incomplete"):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """safetensors wraps the disk's error in its own: find it again."""
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
