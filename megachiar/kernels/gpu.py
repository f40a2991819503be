"""The one place where triton is imported: optional, without it GPUs run the plain torch operations."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


INTERPRETED = triton is not None and triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), for tests on a CPU."""


def has_kernels(device: torch.device) -> bool:
    """Whether Triton kernels run on ``device``."""
    return triton is not None and device.type == "cuda"


def jit(function, **options):
    """``function`` as a Triton kernel; as it is, never to be called, without triton."""
    return function if triton is None else triton.jit(function, **options)
