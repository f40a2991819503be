"""Compile attention's kernels for sm_90, with no GPU: what each uses, as JSON.

python triton_compile_worker.py
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Planned:
    """A driver of a GPU that is not there."""

    get_current_device = get_current_stream = lambda self, device=None: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)  # noqa: E731


driver.set_active(Planned())

from megachiar.kernels import triton_attention  # noqa: E402

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
KERNELS = ("_forward", "_backward_queries", "_backward_keys")


class Compiled:
    """Stands for a kernel: is compiled, and not launched."""

    def __init__(self, name: str, into: dict):
        self.name, self.kernel, self.into = name, getattr(triton_attention, name), into

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.into[self.name] = self.kernel.warmup(*arguments, grid=grid, **options)

        return launch


def main() -> None:
    compiled: dict = {}
    for name in KERNELS:
        setattr(triton_attention, name, Compiled(name, compiled))
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        for c in (64, 128):
            for dropped in (False, True):
                attend(c, dtype, dropped)
                for name, kernel in compiled.items():
                    found[f"{name} {dtype} {c} channels, dropout {dropped}"] = usage(kernel)
    print(json.dumps(found))


def attend(c: int, dtype: torch.dtype, dropped: bool) -> None:
    q, k, v = (torch.randn(2, 4, 256, c, dtype=dtype).requires_grad_() for _ in range(3))
    keys, columns = torch.zeros(2, 4, 256, dtype=torch.int64), torch.zeros(256, dtype=torch.int32)
    mask = triton_attention.Mask(keys, columns, 5, 1.1) if dropped else None
    at, counts = torch.arange(256).expand(2, -1), torch.tensor([256, 256])
    triton_attention.attend(q, k, v, at, counts, None, mask).sum().backward()


def usage(kernel) -> dict[str, int]:
    """Registers, bytes of stack (spills) and shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        shown = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True)
    numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown.stdout + shown.stderr)}
    return numbers | {"shared": kernel.metadata.shared}


if __name__ == "__main__":
    main()
