"""Checkpoints that are whole or not there.

    RUN/checkpoints/step_00000250/      one folder a checkpoint
        state.json                          what it is, with the size of every other file: written last
        config.yaml                         the resolved config of the run that wrote it
        weights-p00-t00-d00.safetensors     fp32 weights by name, and
        optimizer-p00-t00-d00.safetensors   AdamW's moments, shared out over ranks as store.py says

A run of any layout (pipeline, tensor and data ranks, ZeRO stage, micro-batch size) goes on from it.

Everything is written to ``step_00000250.incomplete`` and renamed when all ranks are done and the files are on disk.
A killed run leaves such a folder behind; it is never read, and the next run removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from megachiar import __version__
from megachiar.checkpoint.sharded_tensors import ShardWriter, Store
from megachiar.config import ModelConfig, RunConfig, load_config
from megachiar.data.sampling.history import Change, DataHistory
from megachiar.data.storage.files import sync_folder, write_atomically
from megachiar.engine.optimizer import MOMENTS
from megachiar.errors import UserError, disk_errors
from megachiar.model import ChiarFormer, build_model
from megachiar.model.dtypes import DTYPES
from megachiar.topology import LaunchError

if TYPE_CHECKING:  # reading a checkpoint needs no engine
    from megachiar.engine.engine import Engine

FORMAT_VERSION = 3
STATE_FILE, CONFIG_FILE = "state.json", "config.yaml"
_NAME = re.compile(r"step_(\d{8,})")
# Model keys that may differ between a checkpoint and the run that loads it: they change no weight's meaning.
_FREE_MODEL_KEYS = {"dropout", "max_sequence_length", "initializer_std"}
_FREE_ROUTER_KEYS = {"tau", "tau_low", "tau_high", "attention_share", "rbf_share", "seed"}
_FREE_ROUTER_KEYS |= {"collapse_weight", "collapse_temperature"}


class CheckpointState(BaseModel):
    """What ``state.json`` records.

    Attributes:
        step: optimizer steps taken.
        samples: training samples consumed by all ranks together: the position in the data.
        data: where these samples came from.
        optimizer_steps: of them, those that changed weights: fp16 overflows are left out.
        loss_scale: of fp16, with its counters; else None.
        layout: what wrote the files, for the reader's eye.
        files: size in bytes of each file of the folder, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[3] = FORMAT_VERSION
    created_by: str = f"megachiar {__version__}"
    step: int
    samples: int
    data: DataHistory
    optimizer_steps: int
    loss_scale: dict[str, float] | None
    layout: str
    files: dict[str, int]


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def whole_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first. Folders with missing or short files are left out."""
    named = [path for path in folder.glob("step_*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return [path for path in sorted(named, key=_step_of) if damage(path) is None]


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of ``checkpoint``; None if it is whole.

    Raises:
        LaunchError: it is of another version of the format: to pass over it would lose the run.
    """
    try:
        text = (checkpoint / STATE_FILE).read_bytes()
        _refuse_other_format(checkpoint, text)
        state = CheckpointState.model_validate_json(text)
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (OSError, ValidationError) as error:
        return f"{STATE_FILE} cannot be read: {str(error).splitlines()[0]}"
    for name, size in state.files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    return None


def _refuse_other_format(checkpoint: Path, text: bytes) -> None:
    try:
        state = json.loads(text)
    except ValueError:
        return  # damaged
    version = state.get("format_version") if isinstance(state, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise LaunchError(
            checkpoint / STATE_FILE,
            f"format_version {version}, written by {state.get('created_by')}; this is megachiar {__version__}, "
            f"which reads {FORMAT_VERSION}",
            "use the version that wrote it, or another logging.folder",
        )


def read_state(checkpoint: Path) -> CheckpointState:
    """The record of a checkpoint.

    Raises:
        UserError: the checkpoint is damaged.
    """
    problem = damage(checkpoint)
    if problem is not None:
        raise UserError(checkpoint, f"is no whole checkpoint: {problem}", "use another checkpoint of the run")
    return CheckpointState.model_validate_json((checkpoint / STATE_FILE).read_bytes())


def find_checkpoint(path: Path | str) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest whole one of a run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / STATE_FILE).exists():
        read_state(path)
        return path
    for folder in (path / "checkpoints", path):
        if whole := whole_checkpoints(folder):
            return whole[-1]
    problem = "holds no whole checkpoint" if path.is_dir() else "no such folder"
    raise UserError(path, problem, "give a run folder (logging.folder of its config) or one of its checkpoints")


def save_checkpoint(engine: Engine, step: int, data: DataHistory, keep: int | None) -> Path:
    """Write a checkpoint of a run that has read ``data``; every rank calls it. Afterwards the ``keep`` newest remain.

    Raises:
        UserError: the disk is full or read-only; no folder that looks whole is left.
    """
    from megachiar.engine.deepspeed_patches import loss_scale_state

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
    from megachiar.engine.gathered_state import gather_state

    writer = ShardWriter(engine.topology)
    mine = False
    for tensor in gather_state(engine):
        if tensor.moment is None:
            mine = writer.is_mine(tensor.shard)
        if mine:
            writer.add(tensor.name, tensor.moment, tensor.value, tensor.shard)
    writer.write(folder)


def resume(engine: Engine, checkpoint: Path) -> CheckpointState:
    """Set weights, optimizer and loss scale; returns the record with the position to go on from.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    from megachiar.engine.deepspeed_patches import set_loss_scale_state
    from megachiar.engine.gathered_state import set_moments, set_weights

    state = read_state(checkpoint)
    saved = load_config(checkpoint / CONFIG_FILE)
    check_same_model(checkpoint, saved.model, engine.config.model)
    read = Store(checkpoint).reader(engine.topology.tensor)
    set_weights(engine, read)
    set_moments(engine, read, state.optimizer_steps)
    engine.skipped_steps = state.step - state.optimizer_steps
    if state.loss_scale is not None:
        set_loss_scale_state(engine.deepspeed, state.loss_scale)
    return state


def start_from(engine: Engine, checkpoint: Path) -> None:
    """Set the weights alone, for a new run.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    from megachiar.engine.gathered_state import set_weights

    read_state(checkpoint)
    check_same_model(checkpoint, load_config(checkpoint / CONFIG_FILE).model, engine.config.model)
    set_weights(engine, Store(checkpoint).reader(engine.topology.tensor))


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Whole fp32 weights and buffers of a checkpoint of any layout by name, on the CPU.

    Raises:
        UserError: the checkpoint is damaged.
    """
    read_state(checkpoint)
    store = Store(checkpoint)
    return {name: store.whole(name) for name in store.names() if not name.endswith(MOMENTS)}


def load_for_inference(
    path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[RunConfig, ChiarFormer, CheckpointState]:
    """Config, model (in evaluation mode) and record of a checkpoint or of a run folder's newest one.

    Args:
        path: run folder or checkpoint folder.
        device: where the model goes.
        dtype: of its weights; by default the type the run computed in.
    """
    checkpoint = find_checkpoint(path)
    config = load_config(checkpoint / CONFIG_FILE)
    model = build_model(config.model, seed=config.training.seed, document_end=config.document_end)
    model.load_state_dict(read_weights(checkpoint))
    dtype = dtype or compute_dtype(config)
    return config, model.to(device=device, dtype=dtype).eval(), read_state(checkpoint)


def compute_dtype(config: RunConfig) -> torch.dtype:
    return DTYPES[config.precision.compute]


def check_same_model(checkpoint: Path, saved: ModelConfig, wanted: ModelConfig) -> None:
    """Check that weights of ``saved`` mean the same in ``wanted``.

    Raises:
        UserError: names every key that differs, with both values.
    """
    before, now = _binding_keys(saved), _binding_keys(wanted)
    different = [key for key in now if before.get(key) != now[key]]
    if different:
        raise LaunchError(
            checkpoint,
            "is of another model: "
            + ", ".join(f"model.{k} {before.get(k)!r} there, {now[k]!r} here" for k in different),
            "use the config the checkpoint was written with (config.yaml beside it), or another logging.folder",
        )


def _binding_keys(model: ModelConfig) -> dict[str, Any]:
    flat = {"ffn_hidden_size": model.ffn_size}
    for key, value in model.model_dump(mode="json").items():
        if isinstance(value, dict):
            free = _FREE_ROUTER_KEYS if key == "router" else {"init"} if key == "meta_router" else set()
            flat.update({f"{key}.{name}": v for name, v in value.items() if name not in free})
        elif key not in _FREE_MODEL_KEYS | set(flat):
            flat[key] = value
    return flat


def check_data(checkpoint: Path, state: CheckpointState, config: RunConfig, wanted: DataHistory) -> list[Change]:
    """What the run reads otherwise from now on than it did up to ``checkpoint``.

    Args:
        wanted: what ``config`` would read from the beginning.

    Raises:
        LaunchError: something changed that ``data.on_change`` does not allow, or that has no meaning in mid-run.
    """
    changes = state.data.changes(wanted, state.step)
    for change in changes:
        if not change.defined:
            remedy = "go on with the saved value, or start a new run from its weights alone with checkpoint.load_from"
        elif config.data.on_change == "refuse":
            remedy = (
                "set it back, or set data.on_change=continue: every source then goes on from where it is; or start a "
                "new run from its weights alone with checkpoint.load_from"
            )
        else:
            continue
        raise LaunchError(
            f"{checkpoint}: {change.key}",
            f"was {change.before} when it was saved and is {change.now} now: the order of samples would change",
            remedy,
        )
    return changes


def describe_mask_change(checkpoint: Path, config: RunConfig) -> list[str]:
    """Return a line where ``config`` keeps documents apart otherwise than the run did up to ``checkpoint``."""

    def mask(end: int | None) -> str:
        return "off" if end is None else f"at id {end}"

    before, now = load_config(checkpoint / CONFIG_FILE).document_end, config.document_end
    if before == now:
        return []
    return [f"data.document_mask was {mask(before)} up to here and is {mask(now)} from here on"]


def _step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


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
        for path in whole_checkpoints(folder)[:-keep]:
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
