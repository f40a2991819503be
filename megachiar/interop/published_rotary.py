"""The rotary tables of the published code: what they say of a model, and the tables of a model of ours.

The published code keeps frequencies, cosines and sines of every attention layer in its checkpoints, as buffers.

Shapes: c = channels of a head, T = longest sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megachiar.errors import UserError
from megachiar.interop.published_file import PublishedFile
from megachiar.interop.published_names import COSINES, FREQUENCIES, SINES

USUAL_BASE = 10000.0
_TOLERANCE = 1e-2
"""Largest difference of a table from what its base gives: tables of 16 bits are nearly as far off."""


class RotaryTables(NamedTuple):
    """What rotary tables say: channels of a head, longest sequence in tokens, and base."""

    head_size: int
    length: int
    base: float


def published_tables(head_size: int, length: int, base: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return frequencies (c / 2,), cosines (T, c) and sines (T, c), with the bits of the published code's, fp32."""
    exponents = torch.arange(0, head_size, 2).float() / head_size
    frequencies = 1.0 / (base**exponents)
    angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
    return frequencies, angles.cos(), angles.sin()


def read_rotary(file: PublishedFile) -> RotaryTables | None:
    """Return what the rotary tables of ``file`` say; None if it has none.

    Raises:
        UserError: they contradict each other, or are not those of rotary embedding.
    """
    frequencies, cosines, sines = (_tables(file, name) for name in (FREQUENCIES, COSINES, SINES))
    if not frequencies and not cosines and not sines:
        return None
    if not frequencies or not cosines or not sines:
        raise _unusable(
            file, f"it has {len(frequencies)} of frequencies, {len(cosines)} of cosines, {len(sines)} of sines"
        )
    (name, first), (_, wave) = next(iter(frequencies.items())), next(iter(cosines.items()))
    if first.dim() != 1 or len(first) == 0 or wave.dim() != 2 or wave.shape[1] != 2 * len(first) or len(wave) == 0:
        raise _unusable(file, f"{name} has shape {tuple(first.shape)}, and its cosines {tuple(wave.shape)}")
    head_size, length = wave.shape[1], wave.shape[0]
    base = _find_base(file, first)
    expected = published_tables(head_size, length, base)
    for tables, wanted in zip((frequencies, cosines, sines), expected, strict=True):
        for name, table in tables.items():
            if table.shape != wanted.shape:
                raise _unusable(
                    file, f"{name} has shape {tuple(table.shape)}, where the first ones make it {tuple(wanted.shape)}"
                )
            if not torch.allclose(table.float(), wanted, rtol=0, atol=_TOLERANCE):
                raise _unusable(file, f"{name} is not that of base {base:g}")
    return RotaryTables(head_size, length, base)


def _tables(file: PublishedFile, ending: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in file.tensors.items() if name.endswith(f".{ending}")}


def _find_base(file: PublishedFile, frequencies: torch.Tensor) -> float:
    """Return the base of frequencies (c / 2,): what ``cfg`` says, or the roundest number that they allow.

    Raises:
        UserError: they are no powers of a base.
    """
    pairs = len(frequencies)
    said = file.setting("rope_base", float, int)
    candidates = [float(said)] if said is not None else [USUAL_BASE]
    last, relative = float(frequencies[-1]), _TOLERANCE if frequencies.element_size() < 4 else 2e-6
    if said is None and pairs > 1 and 0 < last < float("inf"):
        exact = last ** (-pairs / (pairs - 1))
        candidates += [float(f"{exact:.{digits}g}") for digits in range(1, 8)]
    for base in candidates:
        expected = base ** (-torch.arange(pairs) / pairs)
        if base > 0 and torch.allclose(expected, frequencies.float(), rtol=relative, atol=0):
            return base
    raise _unusable(file, f"its frequencies are not those of base {candidates[-1]:g}")


def _unusable(file: PublishedFile, problem: str) -> UserError:
    return UserError(
        file.path,
        f"has rotary tables that cannot be used: {problem}",
        "give the file as the published code wrote it; without tables --heads and --sequence-length take their place",
    )
