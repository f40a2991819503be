"""Keyed permutations of ``0 .. size - 1`` that are computed position by position and never stored.

A Feistel network over a grid that is a little larger than ``size`` permutes the grid; values that fall outside are sent
through it again until they fall inside (cycle walking).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

ROUNDS = 8  # of the Feistel network; 4 suffice for pseudo-randomness in theory, 8 is cheap beside reading a sample
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's finaliser


def round_keys(*name: int | str) -> np.ndarray:
    """Keys of a permutation, uint64 (ROUNDS,), from what identifies it, such as ``("epoch", seed, 3)``."""
    text = "\x00".join(f"{type(part).__name__}:{part}" for part in name)
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest(), "<u8")


def permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A keyed bijection of ``range(size)``, applied to any of its values in any order.

    A Feistel network over pairs (left, right) with left < a, right < b and a * b >= size, whose halves are moved by
    sums modulo a and b; a value that lands outside ``range(size)`` walks on along its cycle until it is inside. As
    a * b < size + a, hardly any value walks.

    Args:
        values: int64, any shape, each in ``range(size)``.
        size: at least 1.
        keys: uint64 (ROUNDS,), see ``round_keys``.

    Returns:
        int64 array of the shape of ``values``.
    """
    return _walk(_feistel, values, size, keys)


def unpermute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """The inverse of ``permute``: ``unpermute(permute(v, size, keys), size, keys) == v``."""
    return _walk(_feistel_back, values, size, keys)


def _walk(step: Callable[..., np.ndarray], values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """``step`` of each value, again and again until it is inside ``range(size)``."""
    columns, rows = _grid(size)
    values = np.asarray(values, dtype=np.int64)
    result = step(values.reshape(-1), columns, rows, keys)
    outside = result >= size
    while outside.any():
        result[outside] = step(result[outside], columns, rows, keys)
        outside = result >= size
    return result.reshape(values.shape)


def _grid(size: int) -> tuple[int, int]:
    """Columns a and rows b of the smallest nearly square grid with a * b >= size."""
    columns = max(1, int(np.ceil(np.sqrt(size))))
    return columns, -(-size // columns)


def _feistel_back(values: np.ndarray, columns: int, rows: int, keys: np.ndarray) -> np.ndarray:
    """What ``_feistel`` made ``values`` of."""
    right, left = np.divmod(values.astype(np.uint64), np.uint64(columns))
    a, b = np.uint64(columns), np.uint64(rows)
    for number, key in reversed(list(enumerate(keys))):
        if number % 2 == 0:
            left = (left + a - _mix(right, key) % a) % a
        else:
            right = (right + b - _mix(left, key) % b) % b
    return (right * a + left).astype(np.int64)


def _feistel(values: np.ndarray, columns: int, rows: int, keys: np.ndarray) -> np.ndarray:
    """One pass of the network over ``range(columns * rows)``, int64 (n,): each round can be undone."""
    right, left = np.divmod(values.astype(np.uint64), np.uint64(columns))
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix(right, key) % np.uint64(columns)) % np.uint64(columns)
        else:
            right = (right + _mix(left, key) % np.uint64(rows)) % np.uint64(rows)
    return (right * np.uint64(columns) + left).astype(np.int64)


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """64 well-mixed bits of value and key (splitmix64's finaliser)."""
    value = value ^ key
    value = (value ^ (value >> np.uint64(30))) * MIX_1
    value = (value ^ (value >> np.uint64(27))) * MIX_2
    return value ^ (value >> np.uint64(31))
