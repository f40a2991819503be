"""Compare, before a run starts, what all its ranks must have in common: config, data and versions.

A rank that reads another config, another copy of a dataset or another version of a library would train with the others
and spoil the result without a word. Each rank sends one digest. Only where digests differ do ranks send the entries.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import socket
from typing import Any

import torch.distributed as dist

from megachiar import __version__
from megachiar.config import RunConfig
from megachiar.data.sampling.dataset import TokenSource
from megachiar.topology import LaunchError
from megachiar.training.odd_ranks import describe_ranks, odd_groups
from megachiar.training.run_data import RunData

_LIBRARIES = ("torch", "deepspeed", "numpy", "triton")
_MISSING = "not set"


def compare_setups(config: RunConfig, data: RunData) -> None:
    """Check that every rank has the same config, data and versions; every rank calls this function.

    Args:
        config: of this rank, resolved.
        data: that this rank has opened.

    Raises:
        LaunchError: ranks differ. The message names the first entry that differs, its values and the ranks.
    """
    setup = describe_setup(config, data)
    digest = hashlib.sha256(json.dumps(setup).encode()).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    setups: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(setups, (socket.gethostname(), setup))
    raise _first_difference([host for host, _ in setups], [entries for _, entries in setups])


def describe_setup(config: RunConfig, data: RunData) -> dict[str, str]:
    """Return what must be equal on every rank, by a name that a message can show."""
    entries = {key: json.dumps(value) for key, value in config.flat().items()}
    for source in data.sources:
        entries[f"data of {source.prefix}"] = fingerprint(source)
    entries["version of megachiar"] = __version__
    entries["version of Python"] = ".".join(platform.python_version_tuple()[:2])
    for library in _LIBRARIES:
        entries[f"version of {library}"] = _version(library)
    return entries


def fingerprint(source: TokenSource) -> str:
    """Return sizes and a digest of a dataset's files, as this rank reads them.

    The digest covers the manifest's checksum, and a few blocks of each file.
    """
    manifest = source.manifest.content if source.manifest else None
    content = manifest or "without a checksum"
    return f"{source.tokens.size:,} tokens, content {content}, files {source.sampled_digest()}"


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _first_difference(hosts: list[str], setups: list[dict[str, str]]) -> LaunchError:
    """Return the error that names the first entry that differs between ranks."""
    names = list(dict.fromkeys(name for setup in setups for name in setup))
    name = next(n for n in names if len({setup.get(n, _MISSING) for setup in setups}) > 1)
    odd, usual = odd_groups([setup.get(name, _MISSING) for setup in setups])
    values = "; ".join(f"{value} on {describe_ranks(ranks, hosts)}" for value, ranks in odd)
    return LaunchError(
        name,
        f"is {values}, but {usual[0]} on {describe_ranks(usual[1], hosts)}: ranks of one run must have the same",
        "start all ranks with one config, one set of datasets and one environment",
    )
