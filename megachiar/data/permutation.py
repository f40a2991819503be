"""Permute ``0 .. size - 1`` by a key, position by position, without storing the permutation.

A Feistel network permutes a grid that is a little larger than ``size``. Values that fall outside ``range(size)`` are
sent through it again until they fall inside (cycle walking).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8  # of the Feistel network; in theory 4 are pseudo-random, and 8 are cheap beside reading a sample
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's finaliser


def round_keys(*name: int | str) -> NDArray[np.uint64]:
    """Return the keys of a permutation, uint64 (ROUNDS,), from its name, such as ``("epoch", seed, 3)``."""
    text = "\x00".join(f"{type(part).__name__}:{part}" for part in name)
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest(), "<u8")


def permute(values: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Apply a keyed bijection of ``range(size)`` to any of its values, in any order.

    The Feistel network works on pairs (left, right) with left < a, right < b and a * b >= size, and adds to its halves
    modulo a and b. A value that lands outside ``range(size)`` walks along its cycle until it is inside. As
    a * b < size + a, hardly any value walks.

    Args:
        values: int64 of any shape, each in ``range(size)``.
        size: the number of values, at least 1.
        keys: uint64 (ROUNDS,), see ``round_keys``.

    Returns:
        An int64 array of the shape of ``values``.
    """
    return _walk(_feistel, values, size, keys)


def unpermute(values: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Apply the inverse of ``permute``: ``unpermute(permute(v, size, keys), size, keys) == v``."""
    return _walk(_feistel_back, values, size, keys)


def _walk(
    step: Callable[..., NDArray[np.int64]], values: NDArray[np.int64], size: int, keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Apply ``step`` to each value, again and again until it is inside ``range(size)``."""
    columns, rows = _grid(size)
    values = np.asarray(values, dtype=np.int64)
    result = step(values.reshape(-1), columns, rows, keys)
    outside = result >= size
    while outside.any():
        result[outside] = step(result[outside], columns, rows, keys)
        outside = result >= size
    return result.reshape(values.shape)


def _grid(size: int) -> tuple[int, int]:
    """Return columns a and rows b of the smallest nearly square grid with a * b >= size."""
    columns = max(1, int(np.ceil(np.sqrt(size))))
    return columns, -(-size // columns)


def _feistel_back(values: NDArray[np.int64], columns: int, rows: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Undo one pass of the network: return what ``_feistel`` made ``values`` of, int64 (n,)."""
    right, left = np.divmod(values.astype(np.uint64), np.uint64(columns))
    a, b = np.uint64(columns), np.uint64(rows)
    for number, key in reversed(list(enumerate(keys))):
        if number % 2 == 0:
            left = (left + a - _mix(right, key) % a) % a
        else:
            right = (right + b - _mix(left, key) % b) % b
    return (right * a + left).astype(np.int64)


def _feistel(values: NDArray[np.int64], columns: int, rows: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Apply one pass of the network over ``range(columns * rows)``, int64 (n,); each round can be undone."""
    right, left = np.divmod(values.astype(np.uint64), np.uint64(columns))
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix(right, key) % np.uint64(columns)) % np.uint64(columns)
        else:
            right = (right + _mix(left, key) % np.uint64(rows)) % np.uint64(rows)
    return (right * np.uint64(columns) + left).astype(np.int64)


def _mix(value: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Return 64 well-mixed bits of value and key, uint64 (n,), by splitmix64's finaliser."""
    value = value ^ key
    value = (value ^ (value >> np.uint64(30))) * MIX_1
    value = (value ^ (value >> np.uint64(27))) * MIX_2
    return value ^ (value >> np.uint64(31))
