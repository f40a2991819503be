"""TensorBoard's event files, below the run folder."""

from __future__ import annotations

import threading
from pathlib import Path

from megachiar.training.trackers.points import Point


class TensorBoardTracker:
    """Writes event files. TensorBoard's writer works in a thread of its own, whose errors come up at a later call.

    Args:
        folder: of the event files.
        step: step that the run continues from; TensorBoard forgets the points of later steps.

    Raises:
        OSError: the disk refuses a file; every method raises it as well.
    """

    def __init__(self, folder: Path, step: int):
        self._folder = folder
        self._open(step)

    def log(self, point: Point) -> None:
        """Add each scalar to its curve, each list as a histogram whose bins are the layers, and each text."""
        for name, value in point.scalars.items():
            self._writer.add_scalar(name, value, point.step)
        for name, values in point.layers.items():
            self._writer.add_histogram_raw(
                f"{name}/layers",
                min=0.5,
                max=len(values) + 0.5,
                num=sum(values),
                sum=sum(value * layer for layer, value in enumerate(values, 1)),
                sum_squares=sum(value * layer**2 for layer, value in enumerate(values, 1)),
                bucket_limits=[layer + 0.5 for layer in range(len(values) + 1)],
                bucket_counts=[0.0, *values],
                global_step=point.step,
            )
        for name, text in point.texts.items():
            self._writer.add_text(name, text, point.step)

    def rewind(self, step: int) -> None:
        """Begin another event file, which hides the points of later steps."""
        self.close()
        self._open(step)

    def close(self) -> None:
        """Write what is left and close the files."""
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        before = set(threading.enumerate())
        self._writer = SummaryWriter(
            str(self._folder), purge_step=step + 1 if step else 0
        )  # a run at step 0 has nothing yet
        self._threads = set(threading.enumerate()) - before
        self._hook = threading.excepthook
        threading.excepthook = self._without_disk_errors

    def _without_disk_errors(self, arguments: threading.ExceptHookArgs) -> None:
        """Print no traceback for what the disk refused the writer's thread; ``log`` raises it."""
        if not (arguments.thread in self._threads and isinstance(arguments.exc_value, OSError)):
            self._hook(arguments)
