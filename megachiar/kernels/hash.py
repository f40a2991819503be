"""Pseudo-random numbers that are functions of their keys alone: no state, the same on every device and in any order."""

from __future__ import annotations

import torch

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64


def wrap64(number: int) -> int:
    """``number`` modulo 2^64, as int64 has it."""
    return (number + 2**63) % 2**64 - 2**63


def mix64(numbers: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 on int64 ``numbers``."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ _shift_right(numbers, shift)) * factor
    return numbers ^ _shift_right(numbers, 31)


def uniform_hash(numbers: torch.Tensor) -> torch.Tensor:
    """``mix64`` of int64 ``numbers`` as fp64 in [0, 1)."""
    return _shift_right(mix64(numbers), 11).double() * 2.0**-53


def _shift_right(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: int64's own one copies the sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
