"""Keyed dropout, computed by NumPy from its definition in unsigned integers."""

from __future__ import annotations

import numpy as np
import torch

from megachiar.kernels.dropout import row_keys

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(x: np.ndarray) -> np.ndarray:
    """Return SplitMix64's finaliser (Steele, Lea, Flood 2014) of uint64 values."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def unsigned(x: int | torch.Tensor) -> np.ndarray:
    """Return integers as an array of uint64, negative ones modulo 2^64."""
    return np.atleast_1d(x.numpy() if isinstance(x, torch.Tensor) else np.array(x, np.int64)).astype(np.uint64)


def numpy_row_keys(seed: int, sample_ids: torch.Tensor, positions: torch.Tensor) -> np.ndarray:
    return mixed(mixed(unsigned(sample_ids) + unsigned(seed + 1) * GOLDEN) + unsigned(positions) * GOLDEN)


def numpy_head_keys(keys: np.ndarray, first: int, heads: int) -> np.ndarray:
    return mixed(keys[..., None] + (np.arange(first, first + heads, dtype=np.uint64) + np.uint64(1)) * GOLDEN)


def numpy_mask(keys: np.ndarray, site: int, probability: float, columns: int, first_column: int = 0) -> torch.Tensor:
    """Return a mask (..., m) for uint64 keys (...), True where an element is kept."""
    row = mixed(keys + unsigned(site) * GOLDEN)[..., None]
    column = mixed((np.arange(first_column, first_column + columns, dtype=np.uint64) + np.uint64(1)) * GOLDEN)
    high, low = (row >> np.uint64(32)).astype(np.uint32), row.astype(np.uint32)
    z = (high ^ (column >> np.uint64(32)).astype(np.uint32)) * np.uint32(0x7FEB352D)
    number = (z ^ (z >> np.uint32(15))) * (low | np.uint32(1))
    # number >= p * 2^32 - 2^31 as int32 is the same as number >= p * 2^32 with the top bit of the unsigned one flipped.
    return torch.from_numpy((number ^ np.uint32(2**31)) >= np.uint32(int(probability * 2**32)))


def some_keys(n: int, seed: int = 5) -> torch.Tensor:
    """Return the keys of ``n`` rows, 16 positions of each sample."""
    return row_keys(seed, torch.arange(n) // 16, torch.arange(n) % 16)
