"""Checkpoints that are whole or not there.

    RUN/checkpoints/step_00000250/      one folder a checkpoint
        state.json                          what it is, with the size of every other file: written last
        config.yaml                         the resolved config of the run that wrote it
        weights-p00-t00-d00.safetensors     fp32 weights by name, and
        optimizer-p00-t00-d00.safetensors   AdamW's moments, shared out over ranks, see sharded_tensors.py

A run of any layout (pipeline, tensor and data ranks, ZeRO stage, micro-batch size) goes on from it.

Everything is written to ``step_00000250.incomplete`` and renamed when all ranks are done and the files are on disk.
A killed run leaves such a folder behind; it is never read, and the next run removes it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from megachiar import __version__
from megachiar.checkpoint.sharded_tensors import ShardReader
from megachiar.data.sampling.history import DataHistory
from megachiar.engine.optimizer import MOMENTS
from megachiar.errors import UserError
from megachiar.topology import LaunchError

FORMAT_VERSION = 3
STATE_FILE, CONFIG_FILE = "state.json", "config.yaml"
_NAME = re.compile(r"step_(\d{8,})")


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


def complete_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in ``folder``, oldest first. Folders with missing or short files are left out."""
    named = [path for path in folder.glob("step_*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return [path for path in sorted(named, key=_step_of) if find_damage(path) is None]


def find_damage(checkpoint: Path) -> str | None:
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
    problem = find_damage(checkpoint)
    if problem is not None:
        raise UserError(checkpoint, f"is no whole checkpoint: {problem}", "use another checkpoint of the run")
    return CheckpointState.model_validate_json((checkpoint / STATE_FILE).read_bytes())


def locate_checkpoint(path: Path | str) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest whole one of a run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / STATE_FILE).exists():
        read_state(path)
        return path
    for folder in (path / "checkpoints", path):
        if complete := complete_checkpoints(folder):
            return complete[-1]
    problem = "holds no whole checkpoint" if path.is_dir() else "no such folder"
    raise UserError(path, problem, "give a run folder (logging.folder of its config) or one of its checkpoints")


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Whole fp32 weights and buffers of a checkpoint of any layout by name, on the CPU.

    Raises:
        UserError: the checkpoint is damaged.
    """
    read_state(checkpoint)
    reader = ShardReader(checkpoint)
    return {name: reader.whole(name) for name in reader.names() if not name.endswith(MOMENTS)}


def _step_of(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])
