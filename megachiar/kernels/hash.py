"""Pseudo-random numbers that are functions of their keys alone: no state, the same on every device and in any order."""

from __future__ import annotations

import torch

GOLDEN = -0x61C8864680B583EB
"""2^64 divided by the golden ratio, as an int64."""
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""The finaliser of SplitMix64: each step XORs a 64-bit number with itself shifted right, then multiplies it."""


def wrap64(number: int) -> int:
    """Return ``number`` modulo 2^64 in the range of int64."""
    return (number + 2**63) % 2**64 - 2**63


def mix64(numbers: torch.Tensor) -> torch.Tensor:
    """Apply the finaliser of SplitMix64 to int64 ``numbers``."""
    for shift, factor in MIX:
        shifted = (numbers >> shift) & ((1 << (64 - shift)) - 1)  # int64's own shift copies the sign
        numbers = (numbers ^ shifted) * wrap64(factor)
    return numbers


def uniform_hash(numbers: torch.Tensor) -> torch.Tensor:
    """Turn int64 ``numbers`` into pseudo-random fp64 numbers in [0, 1) by ``mix64``."""
    return ((mix64(numbers) >> 11) & (2**53 - 1)).double() * 2.0**-53
