"""The metrics of a run: ``metrics.jsonl``, one JSON record a line, and TensorBoard's event files."""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from megachiar.data.storage.files import write_atomically
from megachiar.errors import disk_errors


class MetricsWriter:
    """Write each record to ``metrics.jsonl`` and TensorBoard; rank 0 alone does so.

    Args:
        folder: the run folder.
        tensorboard: whether to write event files.
        step: step that the run continues from. Records of later steps, which a run wrote and then stopped before it
            saved, are removed, so that the file holds one history.

    Raises:
        UserError: the disk is full or read-only; ``write`` raises it as well.
    """

    def __init__(self, folder: Path, tensorboard: bool, step: int):
        self.path = folder / "metrics.jsonl"
        self._forget_after(step)
        with disk_errors(self.path):
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (stays open as long as the run)
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with disk_errors(folder):
                self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
        """Append one record of ``step``; a list (one value a layer) becomes one TensorBoard curve a layer."""
        with disk_errors(self.path):
            self._file.write(json.dumps({"step": step, "kind": kind, **_without_nan(values)}) + "\n")
            self._file.flush()
        if self._tensorboard is None:
            return
        for name, value in values.items():
            many = isinstance(value, list)
            for tag, number in (
                [(f"{name}/layer_{i + 1:02d}", v) for i, v in enumerate(value)] if many else [(name, value)]
            ):
                if isinstance(number, (int, float)) and math.isfinite(number):
                    self._tensorboard.add_scalar(f"{kind}/{tag}", number, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _forget_after(self, step: int) -> None:
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        write_atomically(self.path, "".join(line + "\n" for line in kept).encode())


def read_metrics(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records of a run's ``metrics.jsonl``, oldest first; only those of ``kind`` if it is given."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if kind in (None, record["kind"])]


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):  # a killed run may leave half a last line
        return math.inf


def _without_nan(value: Any) -> Any:
    """Return ``value`` with None in place of nan and inf, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most bytes that this rank has held: allocated on its GPU, or resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
