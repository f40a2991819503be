"""A long run's memory: what of it there is, and giving back what is free."""

from __future__ import annotations

import ctypes
import os

LARGE_BLOCK = 1 << 20  # bytes; more than most of what a chunk of text becomes
KEPT_FREE = 8 << 20  # bytes at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def own_bytes() -> int:
    """Memory that this process holds apart from mapped files: heaps, stacks. 0 where the system does not tell it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, of_files, *_ = map(int, file.read().split())
            return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def keep_large_blocks_apart() -> None:
    """Have the C library return large blocks to the system when they are freed, in this process and its copies.

    glibc does so until the first one is freed, and from then on keeps room for more of that size in its heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        mallopt(M_TRIM_THRESHOLD, KEPT_FREE)


def give_back_free_memory() -> None:
    """Have the C library return free pages to the system. glibc keeps those that lie between others in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
