"""What a checkpoint is on disk: its names, its record, and how a reader tells a complete one from a damaged one.

    RUN/checkpoints/step_00000250/      one folder a checkpoint
        state.json                          a CheckpointState, with the size of every other file; written last
        config.yaml                         the resolved config of the run that wrote the checkpoint
        weights-p00-t00-d00.safetensors     fp32 weights by name, one file a rank that writes
        optimizer-p00-t00-d00.safetensors   AdamW's moments, sharded over ranks like the weights (sharded_tensors.py)

A run of any layout (pipeline, tensor and data ranks, ZeRO stage, micro-batch size) can continue from a checkpoint.

A checkpoint is complete or absent. Every file is written to ``step_00000250.incomplete``; the folder is renamed when
all ranks are done and the files are on disk. A killed run leaves an ``.incomplete`` folder behind. No run reads it, and
the next run removes it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from megachiar import __version__
from megachiar.checkpoint.sharded_tensors import ShardReader
from megachiar.data.sampling.history import DataHistory
from megachiar.engine.optimizer import MOMENTS
from megachiar.errors import UserError
from megachiar.topology import LaunchError

FORMAT_VERSION: Final = 3
STATE_FILE, CONFIG_FILE = "state.json", "config.yaml"
_NAME = re.compile(r"step_(\d{8,})")


class CheckpointState(BaseModel):
    """The record of a checkpoint, which ``state.json`` holds.

    Attributes:
        format_version: of the folder, see ``FORMAT_VERSION``.
        created_by: program and version that wrote the checkpoint.
        step: optimizer steps taken.
        samples: training samples that all ranks together have consumed; this is the run's position in the data.
        data: sources and order of these samples.
        optimizer_steps: steps that changed the weights; steps that fp16 skipped after an overflow are not counted.
        loss_scale: fp16 loss scale with its counters; None for other dtypes.
        layout: layout of the run that wrote the files, as text for people.
        files: size in bytes of each file of the folder but ``state.json``, by name.
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
    """Return the name of the folder that holds the checkpoint of ``step``."""
    return f"step_{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in ``folder``, oldest first, without those that ``find_damage`` reports.

    Raises:
        LaunchError: a checkpoint has another version of the format, see ``find_damage``.
    """
    steps = {path: int(name[1]) for path in folder.glob("step_*") if (name := _NAME.fullmatch(path.name))}
    named = [path for path in sorted(steps, key=steps.__getitem__) if path.is_dir()]
    return [path for path in named if find_damage(path) is None]


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with the files of ``checkpoint``; None if it is complete.

    Raises:
        LaunchError: the checkpoint has another version of the format. A run that ignored it would start over.
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
            return f"{name} has {path.stat().st_size} bytes, but {size} were written"
    return None


def _refuse_other_format(checkpoint: Path, text: bytes) -> None:
    try:
        state = json.loads(text)
    except ValueError:
        return  # the file is damaged: find_damage reports it
    version = state.get("format_version") if isinstance(state, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise LaunchError(
            checkpoint / STATE_FILE,
            f"has format_version {version}, written by {state.get('created_by')}; this is megachiar {__version__}, "
            f"which reads format_version {FORMAT_VERSION}",
            "use the version that wrote the checkpoint; or leave it: name another logging.folder, or another "
            "checkpoint.load_from where that names it",
        )


def read_state(checkpoint: Path) -> CheckpointState:
    """Return the record of a checkpoint.

    Raises:
        UserError: the checkpoint is damaged or has another version of the format.
    """
    problem = find_damage(checkpoint)
    if problem is not None:
        raise UserError(checkpoint, f"is not a complete checkpoint: {problem}", "use another checkpoint of the run")
    return CheckpointState.model_validate_json((checkpoint / STATE_FILE).read_bytes())


def locate_checkpoint(path: Path | str) -> Path:
    """Return the checkpoint at ``path``, or the newest complete one of the run folder at ``path``.

    Raises:
        UserError: there is no complete checkpoint at ``path``.
    """
    path = Path(path)
    if (path / STATE_FILE).exists():
        read_state(path)
        return path
    for folder in (path / "checkpoints", path):
        if complete := complete_checkpoints(folder):
            return complete[-1]
    problem = "holds no complete checkpoint" if path.is_dir() else "no such folder"
    raise UserError(path, problem, "give a run folder (logging.folder of its config) or one of its checkpoints")


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return whole fp32 weights and buffers by name, on the CPU, of a checkpoint of any layout.

    Raises:
        UserError: the checkpoint is damaged.
    """
    read_state(checkpoint)
    reader = ShardReader(checkpoint)
    return {name: reader.whole(name) for name in reader.names() if not name.endswith(MOMENTS)}
