"""Stand-ins for Triton kernels that record which of them were launched, so that a test cannot pass without them."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType


class Launched:
    """A stand-in for a kernel that launches it and records that it did."""

    def __init__(self, name: str, kernel, into: set[str]):
        self.name, self.kernel, self.into = name, kernel, into

    def __getitem__(self, grid):
        self.into.add(self.name)
        return self.kernel[grid]


def record_launches(kernels: Iterable[tuple[ModuleType, str]]) -> set[str]:
    """Let the kernels, each given by its module and name, record their launches; return the set that they record in."""
    launched: set[str] = set()
    for module, name in kernels:
        setattr(module, name, Launched(name, getattr(module, name), launched))
    return launched
