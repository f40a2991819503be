"""What is recorded of a start of a run: versions, commit, layout, devices, and keys that changed since the last."""

from __future__ import annotations

import platform
import socket
from importlib.metadata import version
from typing import Any

import torch

from megachiar import __version__
from megachiar.checkout import own_commit
from megachiar.checkpoint.compatibility import changed_keys
from megachiar.checkpoint.format import CONFIG_FILE
from megachiar.config import RunConfig, load_config
from megachiar.engine.engine import Engine
from megachiar.errors import UserError


def device_name(engine: Engine) -> str:
    """Return what a rank computes on: the name of its GPU, or CPU."""
    return torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU"


def versions() -> dict[str, str]:
    """Return the versions of what a run computes with, by name."""
    packages = {name: version(name) for name in ("torch", "deepspeed")}
    return {"megachiar": __version__, **packages, "python": platform.python_version()}


def describe_start(engine: Engine, parameters: int) -> dict[str, Any]:
    """Return the event of a start: what runs where, and how long."""
    config, topology = engine.config, engine.topology
    return {
        "versions": versions(),
        "commit": own_commit(),
        "host": socket.gethostname(),
        "ranks": topology.world_size,
        "device": device_name(engine),
        "threads": torch.get_num_threads(),
        "layout": f"{topology.describe()}, ZeRO {config.parallel.zero_stage}, {config.precision.compute}",
        "optimizer": engine.replica.optimizer_implementation,
        "parameters": parameters,
        "steps": config.steps,
        "routed_layers": list(config.model.routed_layers),
    }


def changed_since_last_start(config: RunConfig) -> dict[str, list[Any]] | None:
    """Return the keys whose value differs from the ``config.yaml`` of the run folder, with both values.

    None where the folder has no config, or one that this version cannot read.
    """
    path = config.logging.folder / CONFIG_FILE
    if not path.exists():
        return None
    try:
        before = load_config(path)
    except UserError:
        return None
    return {key: [old, new] for key, old, new in changed_keys(before, config)}
