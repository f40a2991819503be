"""Compile all kernels without a GPU, and print what each of them uses as JSON.

    python triton_compile_worker.py few|all 90|100

few: each kernel in both types, where it needs most registers. The number is the compute capability, such as 90 for an
H100 and 100 for a B200.

``tests/kernels/test_triton.py`` starts it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Planned:
    """A driver for a GPU that is not there."""

    get_current_device = get_current_stream = lambda self, device=None: 0
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[2]), 32)  # noqa: E731


driver.set_active(Planned())

from megachiar.kernels import (  # noqa: E402
    triton_attention,
    triton_cross_entropy,
    triton_dropout,
    triton_factored,
    triton_norm,
    triton_partition,
    triton_permute,
    triton_rope,
    triton_row_products,
)

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
KERNELS = {
    triton_attention: ("_forward", "_backward_queries", "_backward_keys"),
    triton_cross_entropy: ("_read", "_slope"),
    triton_dropout: ("_drop", "_halves"),
    triton_factored: ("_entropy",),
    triton_norm: ("_norm", "_norm_backward"),
    triton_partition: ("_partition",),
    triton_permute: ("_scatter",),
    triton_rope: ("_rotate", "_rotate_both"),
    triton_row_products: ("_products", "_weights"),
}
SIZES = (256, 1024, 4096)
"""Numbers of channels of a token."""


class Compiled:
    """A stand-in for a kernel that is compiled and never launched."""

    def __init__(self, module, name: str, into: dict):
        self.name, self.kernel, self.into = name, getattr(module, name), into

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.into[self.name] = self.kernel.warmup(*arguments, grid=grid, **options)

        return launch


def main() -> None:
    compiled: dict = {}
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, Compiled(module, name, compiled))
    found = {}

    def note(what: str) -> None:
        found.update({f"{name}, {what}": usage(kernel) for name, kernel in compiled.items()})
        compiled.clear()

    few = sys.argv[1] == "few"
    for dtype in (torch.bfloat16, torch.float32):
        for c in (64, 128):
            for dropped, documents in ((False, False), (True, False), (True, True)):
                if few and (c, dropped, documents) != (128, True, True):
                    continue
                attend(c, dtype, dropped, documents)
                note(f"{dtype}, {c} channels of a head, dropout {dropped}, documents {documents}")
        for d in (4096 if dtype == torch.bfloat16 else 1024,) if few else SIZES:
            work_on_rows(d, dtype)
            note(f"{dtype}, {d} channels")
            work_by_route(d, dtype)
            note(f"{dtype}, {d} channels, by route")
            work_in_other_forms(d, dtype)
            note(f"{dtype}, {d} channels, in other forms")
        lose_and_drop(dtype)
        note(f"{dtype}")
    print(json.dumps(found))


def work_on_rows(d: int, dtype: torch.dtype) -> None:
    x, weight = torch.zeros(4, d, dtype=dtype), torch.ones(d, dtype=dtype)
    if triton_factored.supports(x):
        triton_factored.entropy(x, 2.0)
    normed = triton_norm.normed(x, x, weight, weight, 1e-5)
    triton_norm.norm_backward(x, *normed[1:], weight)
    triton_permute.scatter(x, torch.arange(4), torch.zeros(4, d, dtype=dtype))
    heads, tables = x.view(4, d // 64, 64), torch.zeros(4, 1, 64, dtype=dtype)
    triton_rope.rotated(heads, tables, tables, back=True)


def work_by_route(d: int, dtype: torch.dtype) -> None:
    """Compile each kernel of a partition in the form that does most."""
    x, matrix = torch.zeros(512, d, dtype=dtype), torch.zeros(d, d, dtype=dtype)
    order, starts = torch.zeros(512, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    triton_partition.partition(torch.zeros(512), torch.zeros(1), 2)
    other = triton_norm.Other(order.long(), x, matrix[0], matrix[0])
    normed = triton_norm.normed(x, x, matrix[0], matrix[0], 1e-5, other)
    triton_norm.norm_backward(x, *normed[1:], matrix[0], other.routes, other.weight)
    triton_row_products.input_products_backward(x, x, x, matrix, matrix, order, starts)
    triton_row_products.input_products_weights_backward(x, x, x, order, starts)
    heads, tables = x.view(512, d // 64, 64), torch.zeros(256, 64, dtype=dtype)
    turned = triton_rope.Turned(heads, heads)
    triton_rope.rotate_both(turned, turned, turned, (tables, tables), 256, True, order, starts)
    triton_dropout.head_halves(order.long(), order, 0, d // 64, 5)


def work_in_other_forms(d: int, dtype: torch.dtype) -> None:
    """Compile the products and the rotation in their other forms; of each kernel the last form is noted."""
    x, matrix = torch.zeros(512, d, dtype=dtype), torch.zeros(d, d, dtype=dtype)
    order, starts = torch.zeros(512, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    triton_row_products.output_product(x, matrix, matrix[0], order, starts)
    triton_row_products.output_product_backward(x, x, matrix, order, starts)
    triton_row_products.input_products(x, matrix, matrix[0], matrix, order, starts)
    heads, tables = x.view(512, d // 64, 64), torch.zeros(256, 64, dtype=dtype)
    turned = triton_rope.Turned(heads, heads)
    triton_rope.rotate_both(turned, None, None, (tables, tables), 256, True, order, starts)
    triton_rope.rotate_both(turned, turned, None, (tables, tables), 256, False)


def lose_and_drop(dtype: torch.dtype) -> None:
    logits, targets = torch.zeros(4, 32000, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    scale, _ = triton_cross_entropy.scales_and_targets(logits, targets)
    triton_cross_entropy.slope_(logits, targets, scale, targets == 0)
    columns = torch.zeros(32000, dtype=torch.int32)
    triton_dropout.drop(logits, targets, columns, 1, 5, 1.1, 3, logits)


def attend(c: int, dtype: torch.dtype, dropped: bool, documents: bool) -> None:
    q, k, v = (torch.randn(512, 4, c, dtype=dtype).requires_grad_() for _ in range(3))
    keys, columns = torch.zeros(512, 4, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    mask = triton_attention.Mask(keys, keys, columns, 5, 1.1) if dropped else None
    starts, last_seen = torch.tensor([0, 256, 512], dtype=torch.int32), torch.arange(512, dtype=torch.int32)
    row_layout = triton_attention.RowLayout(starts, starts, last_seen, 256, 256, last_seen if documents else None)
    triton_attention.attend(q, k, v, row_layout, None, mask).sum().backward()


def usage(kernel) -> dict[str, int]:
    """Return the registers of a kernel, its bytes of stack (spills) and of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        shown = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True)
    numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown.stdout + shown.stderr)}
    return numbers | {"shared": kernel.metadata.shared}


if __name__ == "__main__":
    main()
