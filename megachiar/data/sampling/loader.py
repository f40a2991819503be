"""Feed one data-parallel rank with its micro-batches of a run's samples, which a thread reads ahead.

    position     0                                G                                   G = micro * accumulation * dp
    step         |------------- step 1 -----------|------------- step 2 ----- ...
    micro-step   |--- 0 ----|--- 1 ----| ...
    rank         | 0 | 1 |..| 0 | 1 |..|                                              micro samples each

Step s reads the samples [(s - 1) * G, s * G) of the run. Ranks, micro-batches and accumulation steps only decide which
rank reads which sample. So a run continues exactly, at any position and in any layout.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class Samples(Protocol):
    """The interface of a run's samples, such as ``dataset.SampleStream``."""

    def batch(self, positions: range) -> NDArray[np.int64]:
        """Return the samples at ``positions``, int64 (n, T + 1)."""
        ...


class BatchLoader(Iterator[NDArray[np.int64]]):
    """Iterate without end over this rank's micro-batches, int64 (micro_batch_size, T + 1), which a thread reads ahead.

    If reading fails, the ``next`` call for that batch raises the error, and so does every later one. Use the loader in
    a ``with`` block or call ``close``; without either its thread ends with the process or the object.

    Attributes:
        position: the samples of the run that all ranks together have consumed so far. A later loader begins there.
            Batches that were read ahead but not returned do not count.
        global_batch_size: the samples of one optimizer step.

    Args:
        stream: the run's samples.
        micro_batch_size: the samples of one batch.
        accumulation_steps: the batches that one optimizer step takes on each rank.
        dp_rank, dp_size: this rank among the data-parallel ranks, and their number.
        start_sample: the position to begin at, the ``position`` of an earlier loader.
        prefetch: the batches that are read ahead, at least 1.
        pin_memory: keep batches in page-locked memory, so that they can be copied to a GPU while it computes:
            ``torch.from_numpy(batch).to(device, non_blocking=True)``. Needs CUDA.

    Raises:
        ValueError: a size is below 1, the rank is not one of ``dp_size``, or ``start_sample`` is negative.
    """

    def __init__(
        self,
        stream: Samples,
        micro_batch_size: int,
        accumulation_steps: int,
        dp_rank: int,
        dp_size: int,
        start_sample: int = 0,
        *,
        prefetch: int = 4,
        pin_memory: bool = False,
    ):
        if min(micro_batch_size, accumulation_steps, dp_size, prefetch) < 1 or start_sample < 0:
            raise ValueError(
                f"micro_batch_size {micro_batch_size}, accumulation_steps {accumulation_steps}, dp_size {dp_size} and "
                f"prefetch {prefetch} must be at least 1, start_sample {start_sample} at least 0"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} is not one of {dp_size} ranks")
        self.global_batch_size = micro_batch_size * accumulation_steps * dp_size
        self.position = start_sample
        self._samples_per_micro_step = micro_batch_size * dp_size
        self._wait_seconds = 0.0
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._ready: queue.Queue[NDArray[np.int64] | BaseException] = queue.Queue(prefetch)
        first = start_sample + dp_rank * micro_batch_size
        reader = _Reader(stream, first, micro_batch_size, self._samples_per_micro_step, pin_memory)
        # The thread knows the queue and the event but not this object, which can therefore be collected while it runs.
        self._thread = threading.Thread(
            target=_read_ahead, args=(reader, self._ready, self._stop), name="megachiar-loader", daemon=True
        )
        self._thread.start()

    def __next__(self) -> NDArray[np.int64]:
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise RuntimeError("the loader is closed")
        began = time.perf_counter()
        item = self._ready.get()
        self._wait_seconds += time.perf_counter() - began
        if isinstance(item, BaseException):
            self._error = item
            raise item
        self.position += self._samples_per_micro_step
        return item

    def take_wait_seconds(self) -> float:
        """Return the seconds that ``next`` has waited for data since the last call of this method."""
        waited, self._wait_seconds = self._wait_seconds, 0.0
        return waited

    def close(self) -> None:
        """End the thread and drop the batches that were read ahead; calling it again does nothing."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # the constructor refused its arguments
            self._stop.set()


class _Reader:
    """Read one rank's micro-batches in order."""

    def __init__(self, stream: Samples, first: int, size: int, stride: int, pin_memory: bool):
        self._stream, self._next, self._size, self._stride = stream, first, size, stride
        # A thread begins on device 0: without this each rank would open a context there.
        self._pin_for = torch.cuda.current_device() if pin_memory else None

    def read(self) -> NDArray[np.int64]:
        """Return the next micro-batch, int64 (size, T + 1)."""
        batch = self._stream.batch(range(self._next, self._next + self._size))
        self._next += self._stride
        if self._pin_for is None:
            return batch
        with torch.cuda.device(self._pin_for):
            return torch.from_numpy(batch).pin_memory().numpy()


def _read_ahead(reader: _Reader, ready: queue.Queue[NDArray[np.int64] | BaseException], stop: threading.Event) -> None:
    """Keep ``ready`` full until ``stop`` is set or reading fails; the error goes into the queue in its turn."""
    item: NDArray[np.int64] | BaseException
    while not stop.is_set():
        try:
            item = reader.read()
        except BaseException as error:  # whatever it is, the thread that trains must hear of it
            item = error
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if isinstance(item, BaseException):
            return
