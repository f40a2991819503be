"""A long-running process measures its memory and returns free memory to the system."""

from __future__ import annotations

import ctypes
import os

LARGE_BLOCK = 1 << 20  # bytes; most objects that a chunk of text becomes are smaller
KEPT_FREE = 8 << 20  # bytes that may stay free at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def own_bytes() -> int:
    """Return the bytes that this process holds in heaps and stacks, without mapped files; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, of_files, *_ = map(int, file.read().split())
            return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def keep_large_blocks_apart() -> None:
    """Let the C library return large blocks to the system when they are freed, in this process and its forks.

    glibc does so until the first large block is freed; from then on it keeps blocks of that size in its heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        mallopt(M_TRIM_THRESHOLD, KEPT_FREE)


def give_back_free_memory() -> None:
    """Let the C library return free pages to the system, also those between pages that are in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
