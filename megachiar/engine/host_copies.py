"""Copies between host and device: batches that never wait, and a step's numbers in one copy that is waited for once.

    host     launch ...  copy batch  launch ...  copy numbers | wait | decide | launch the optimizer
    device   .... kernels ....................................|......|        | kernels

A copy runs beside the computation only from page-locked memory, and to it.
"""

from __future__ import annotations

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return ``array`` on ``device``, by a copy that the host does not wait for; on a CPU it is the array itself."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class NumberReader:
    """Reads a vector of numbers from the device, in one copy to page-locked memory and one wait.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pinned = torch.empty(0, dtype=torch.float64)

    def read(self, vector: torch.Tensor) -> list[float]:
        """Return the numbers of ``vector`` (n,) float64, once all that was launched before is done."""
        if self._device.type != "cuda":
            return vector.tolist()
        if self._pinned.shape != vector.shape:
            self._pinned = torch.empty(vector.shape, dtype=torch.float64, pin_memory=True)
        self._pinned.copy_(vector, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return self._pinned.tolist()
