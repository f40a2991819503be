"""Digests of the tensors that a rank holds, to compare them with those of other ranks.

A digest is a sum over the tensor's 64-bit words, each mixed with its position, modulo 2^64. Words are integers, so the
digest does not depend on the order of the summation: equal bits give equal digests on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megachiar.engine import deepspeed_patches
from megachiar.engine.engine import Engine
from megachiar.kernels.hash import GOLDEN, mix64
from megachiar.model.layer import RoutedLayer
from megachiar.parallel.shard import shard_of

_CHUNK_WORDS = 2**20
"""Words that are mixed at once, which bounds the memory of a digest to some 8 MiB buffers."""


class Sharing(NamedTuple):
    """Which ranks hold the same tensor as this rank.

    Attributes:
        over_data: every data-parallel replica.
        over_tensor: every rank of the tensor-parallel group.
        over_ends: the first and the last pipeline stage, which alone hold the tensor.
    """

    over_data: bool
    over_tensor: bool
    over_ends: bool


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that this rank holds, by its name in the model, with the ranks that must hold the same."""

    name: str
    value: torch.Tensor
    sharing: Sharing


def held_tensors(engine: Engine) -> Iterator[HeldTensor]:
    """Yield weights, buffers and the last routes that this rank holds.

    Under ZeRO 3 a rank holds a shard of a parameter, which differs between replicas. Ranks of a tensor-parallel group
    hold the same shard of a replicated parameter.
    """
    for name, parameter in engine.named_parameters():
        shard = deepspeed_patches.own_shard(parameter, engine.topology.data_rank)
        value = parameter.detach() if shard is None else shard
        yield HeldTensor(name, value, Sharing(shard is None, shard_of(parameter) is None, _is_tied(name, engine)))
    for name, buffer in engine.named_buffers():
        yield HeldTensor(name, buffer, Sharing(True, True, _is_tied(name, engine)))
    for module in engine.deepspeed.module.modules():
        if isinstance(module, RoutedLayer) and module.last_routes is not None:
            yield HeldTensor(f"routes of {module.name}", module.last_routes, Sharing(False, True, False))


def _is_tied(name: str, engine: Engine) -> bool:
    """Return whether both ends of a pipeline hold the tensor: the embedding, which is a language model's head too."""
    return name.startswith("embedding.") and engine.config.tasks[0].head is None


def digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return the digest () int64 of a tensor's bits, on its device. One changed word always changes it."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    missing = -len(data) % 8
    if missing or data.storage_offset() % 8:  # only aligned bytes can be read as words
        data = torch.cat([data, data.new_zeros(missing)])
    words = data.view(torch.int64)
    total = torch.full((), len(words), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(words), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS]
        positions = torch.arange(start + 1, start + len(chunk) + 1, device=tensor.device)
        total += mix64(chunk ^ (positions * GOLDEN)).sum()
    return total
