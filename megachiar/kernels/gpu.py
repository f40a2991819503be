"""Only this module imports Triton. It is optional: without it GPUs run plain torch operations."""

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
    """Say whether this process may use Triton kernels at all (``precision.kernels``)."""
    global _allowed
    _allowed = kernels


def why_not(device: torch.device) -> str | None:
    """Return why Triton kernels do not run on ``device``; None where they do."""
    if not _allowed:
        return "precision.kernels is torch"
    if device.type != "cuda":
        return f"the device is a {device.type.upper()}"
    return "triton is not installed" if triton is None else None


def has_kernels(device: torch.device) -> bool:
    """Return whether Triton kernels run on ``device``."""
    return why_not(device) is None


def jit(function, **options):
    """Compile ``function`` as a Triton kernel. Without Triton it is returned as it is, and never called."""
    return function if triton is None else triton.jit(function, **options)


def compute_type(dtype: torch.dtype):
    """Return Triton's type for products of ``dtype``: fp32 in the interpreter, which keeps bf16 as raw bits."""
    wide = INTERPRETED or dtype == torch.float32
    return tl.float32 if wide else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def product_precision(dtype: torch.dtype) -> str:
    """Return how numbers are multiplied: fp32 in three products of their halves, which keep the precision of fp32."""
    return "tf32x3" if dtype == torch.float32 and not INTERPRETED else "ieee"


def launch_options(warps: int, stages: int = 2) -> dict[str, int]:
    """Return the options that a kernel is compiled with; none in the interpreter."""
    return {} if INTERPRETED else {"num_warps": warps, "num_stages": stages}
