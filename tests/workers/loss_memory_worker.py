"""Count the memory that the head's loss takes in Triton's interpreter, beside what its formula says.

    python loss_memory_worker.py          with TRITON_INTERPRET=1

It prints JSON, {case: [bytes counted, bytes by the formula]}. ``tests/kernels/test_cross_entropy.py`` starts it.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megachiar.kernels import cross_entropy, gpu, triton_cross_entropy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK_BYTES = 2**14  # so small that some of the shapes fill several chunks
# (rows, channels, vocabulary): a part of a chunk; several chunks; a row of whole pages; a wide weight, few rows.
SHAPES = ((5, 16, 500), (20, 16, 500), (10, 16, 1024), (3, 100, 500))


class TensorPeak(TorchDispatchMode):
    """A counter of the bytes of the tensors that operators make: those alive, and the most that were alive at once.

    Tensors in ``given`` are left out.
    """

    def __init__(self, given: list[torch.Tensor]):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                storage = tensor.untyped_storage()
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def counted(step: Callable[[], object], given: list[torch.Tensor]) -> int:
    """Return the most bytes that were alive at once of the tensors that ``step`` makes, without those in ``given``."""
    with TensorPeak(given) as watch:
        step()
    return watch.peak


def measure(rows: int, channels: int, vocabulary: int, dtype: torch.dtype, by_triton: bool) -> tuple[int, int]:
    """Return the bytes counted in a forward and backward pass, and the bytes by the formula.

    The gradient of the rows is left out of both.
    """
    hidden = torch.randn(rows, channels).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, channels).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,))

    def step() -> None:
        cross_entropy.linear_cross_entropy(hidden, weight, targets).loss.backward()

    took = counted(step, [hidden, weight, targets]) - hidden.nbytes
    return took, cross_entropy.buffer_bytes(rows, channels, vocabulary, dtype, "cpu", by_triton)


class Uncounted:
    """A kernel that is launched without being counted.

    Triton's interpreter works on copies of the arguments, which a GPU does not make, and leaves them to the collector.
    """

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)
            gc.collect()

        return launch


def main() -> None:
    for name in ("_read", "_slope"):
        setattr(triton_cross_entropy, name, Uncounted(getattr(triton_cross_entropy, name)))
    gpu.has_kernels = lambda _: True
    cross_entropy.CHUNK_BYTES["cpu"] = CHUNK_BYTES
    cases = {f"{shape} {dtype}": measure(*shape, dtype, by_triton=True) for shape in SHAPES for dtype in DTYPES}
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
