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

_allowed = True


def allow(kernels: bool) -> None:
    """Whether this process may use Triton kernels at all (``precision.kernels``)."""
    global _allowed
    _allowed = kernels


def why_not(device: torch.device) -> str | None:
    """Why Triton kernels do not run on ``device``; None where they do."""
    if not _allowed:
        return "precision.kernels is torch"
    if device.type != "cuda":
        return f"the device is a {device.type.upper()}"
    return "triton is not installed" if triton is None else None


def has_kernels(device: torch.device) -> bool:
    """Whether Triton kernels run on ``device``."""
    return why_not(device) is None


def jit(function, **options):
    """``function`` as a Triton kernel; as it is, never to be called, without triton."""
    return function if triton is None else triton.jit(function, **options)


def compute_type(dtype: torch.dtype):
    """Triton's type for products of ``dtype``. The interpreter keeps bf16 as raw bits: there all of it is fp32."""
    wide = INTERPRETED or dtype == torch.float32
    return tl.float32 if wide else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def product_precision(dtype: torch.dtype) -> str:
    """How fp32 numbers are multiplied: in three products of their halves, which keeps fp32's grade."""
    return "tf32x3" if dtype == torch.float32 and not INTERPRETED else "ieee"


def launch_options(warps: int, stages: int = 2) -> dict[str, int]:
    """What a kernel is compiled with."""
    return {} if INTERPRETED else {"num_warps": warps, "num_stages": stages}
