"""Write the weights of a checkpoint of any layout as the safetensors files of an export, one tensor at a time.

    model.safetensors                       where one file is enough
    model-00001-of-00002.safetensors ...    else, with model.safetensors.index.json, which says which file has what

Names are ours behind ``model.``, and ``classifier.`` for the head of the task that is exported. Numbers that a run
keeps beside its weights are no tensors of an export: ``config.json`` has them, where nothing rounds them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from megachiar.checkpoint.format import CONFIG_FILE, damaged_checkpoint
from megachiar.checkpoint.reading import open_tensors
from megachiar.checkpoint.sharded_tensors import ShardReader, stream_safetensors
from megachiar.config import RunConfig
from megachiar.config.tasks import RunTask
from megachiar.data.storage.files import write_atomically
from megachiar.engine.optimizer import MOMENTS
from megachiar.interop.huggingface_config import RUNNING
from megachiar.model import build_model

BACKBONE, HEAD = "model.", "classifier."
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
"""Bytes of tensors that a file has at most; a larger tensor has a file of its own."""


def exported_names(names: Iterator[str] | list[str], task: RunTask) -> dict[str, str]:
    """Return the name in an export of each of our parameters; heads of other tasks have none."""
    heads = "classifiers."
    own = f"{heads}{task.name}."
    exported = {}
    for name in names:
        if name.startswith(own):
            exported[name] = f"{HEAD}{name.removeprefix(own)}"
        elif not name.startswith(heads) and not name.endswith(RUNNING):
            exported[name] = f"{BACKBONE}{name}"
    return exported


def read_running(checkpoint: Path) -> dict[str, float]:
    """Return the numbers that a run keeps beside its weights, by name."""
    reader = open_tensors(checkpoint)
    return {name: reader.whole(name).item() for name in reader.names() if name.endswith(RUNNING)}


def export_weights(
    checkpoint: Path, config: RunConfig, task: RunTask, folder: Path, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write the weights of ``task`` to ``folder``.

    Returns:
        The names of our parameters that were left out: the heads of other tasks.

    Raises:
        UserError: the checkpoint is damaged, or has another model than its config.
        OSError: the disk is full or read-only.
    """
    reader = open_tensors(checkpoint)
    shapes = {
        name: tensor.shape
        for name, tensor in build_model(config.model, seed=0, device="meta", heads=config.heads).state_dict().items()
    }
    if set(shapes) != {name for name in reader.names() if not name.endswith(MOMENTS)}:
        raise damaged_checkpoint(checkpoint, f"{CONFIG_FILE} has another model than the weights")
    exported = exported_names(list(shapes), task)
    ours = {theirs: name for name, theirs in exported.items()}
    parts = _parts({exported[name]: shape for name, shape in shapes.items() if name in exported}, shard_bytes)
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else WEIGHTS_FILE
        where |= dict.fromkeys(part, file)
        read = _checked_reader(checkpoint, reader, ours, part)
        stream_safetensors(folder / file, part, read, {"format": "pt"})
    if len(parts) > 1:
        size = sum(4 * shape.numel() for part in parts for shape in part.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        write_atomically(folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
    return [name for name in shapes if name not in exported and not name.endswith(RUNNING)]


def _parts(shapes: Mapping[str, torch.Size], shard_bytes: int) -> list[dict[str, torch.Size]]:
    """Cut tensors, in their order, into files of at most ``shard_bytes``."""
    parts: list[dict[str, torch.Size]] = [{}]
    room = shard_bytes
    for name, shape in shapes.items():
        size = 4 * shape.numel()
        if size > room and parts[-1]:
            parts.append({})
            room = shard_bytes
        parts[-1][name] = shape
        room -= size
    return parts


def _checked_reader(checkpoint: Path, reader: ShardReader, ours: Mapping[str, str], shapes: Mapping[str, torch.Size]):
    """Return a function that reads the tensor of an exported name, and refuses one of another shape."""

    def read(name: str) -> torch.Tensor:
        tensor = reader.whole(ours[name])
        if tensor.shape != shapes[name]:
            raise damaged_checkpoint(checkpoint, f"{CONFIG_FILE} has another shape of {ours[name]} than the weights")
        return tensor.contiguous()

    return read
