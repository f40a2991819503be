"""Define the indexed token file, byte for byte: Megatron's MMIDIDX version 1.

A dataset ``PREFIX`` is two files, all little-endian. A *sequence* is a run of tokens, a *document* one or more
sequences; megachiar writes one sequence per document and reads any.

    PREFIX.bin   the tokens of all sequences, one after another, nothing else
    PREFIX.idx   offset      type     what
                 0           9 bytes  b"MMIDIDX\\0\\0"
                 9           u64      version, 1
                 17          u8       code of the tokens' type, see DTYPE_CODES
                 18          u64      S, number of sequences
                 26          u64      D, number of documents + 1
                 34          i32[S]   length of each sequence, in tokens
                 34 + 4S     i64[S]   where each sequence begins in PREFIX.bin, in bytes
                 34 + 12S    i64[D]   the sequence each document begins with, and S at the end

GPT-NeoX's merge tool writes an index with D = 1, so that the index does not say where documents begin. As each of its
documents is one sequence, each sequence of such a dataset is read as a document.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
LARGEST_UINT16_VOCABULARY = 65_500  # Megatron's limit, exclusive
INDEX_ROWS = 1 << 18  # sequences of an index that are handled at once: a few MB


def dtype_for_vocabulary(vocab_size: int) -> np.dtype[Any]:
    """Return the type that Megatron stores token ids in: ``uint16`` for a vocabulary below 65,500, else ``int32``."""
    return np.dtype("<u2") if vocab_size < LARGEST_UINT16_VOCABULARY else np.dtype("<i4")


def dtype_code(dtype: np.dtype[Any] | type | str) -> int:
    """Return the format's code for ``dtype``.

    Raises:
        ValueError: the format has no code for it.
    """
    little_endian = np.dtype(dtype).newbyteorder("<")
    for code, known in DTYPE_CODES.items():
        if known == little_endian:
            return code
    raise ValueError(f"the indexed format cannot hold {np.dtype(dtype)}, only {[d.name for d in DTYPE_CODES.values()]}")
