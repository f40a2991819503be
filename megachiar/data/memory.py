"""A long run's memory: what of it there is, and giving back what is free."""

from __future__ import annotations

import ctypes
import os


def resident_bytes() -> int:
    """Memory that this process holds at the moment, 0 where the system does not tell it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return 0


def give_back_free_memory() -> None:
    """Have the C library return free pages to the system. glibc keeps those that lie between others in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
