"""Pseudo-random numbers that are functions of their keys alone: no state, the same on every device and in any order."""

from __future__ import annotations

import torch

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""The finaliser of SplitMix64 on 64 bits: each step XORs the number with itself shifted right, then multiplies."""


def wrap64(number: int) -> int:
    """``number`` modulo 2^64, as int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


def mix64(numbers: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 on int64 ``numbers``."""
    for shift, factor in MIX:
        shifted = (numbers >> shift) & ((1 << (64 - shift)) - 1)  # int64's own shift copies the sign
        numbers = (numbers ^ shifted) * wrap64(factor)
    return numbers


def uniform_hash(numbers: torch.Tensor) -> torch.Tensor:
    """``mix64`` of int64 ``numbers`` as fp64 in [0, 1)."""
    return ((mix64(numbers) >> 11) & (2**53 - 1)).double() * 2.0**-53
