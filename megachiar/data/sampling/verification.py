"""Compare the files of a run's datasets with the checksums in their manifests, before the run or while it reads.

A manifest has the SHA-256 of each 64 MiB of ``.bin``, ``.idx`` and the labels. The ranks share these blocks out among
themselves, and each block of each copy is read once a run. A dataset without a manifest has nothing to compare with.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from megachiar.data.sampling.dataset import TokenSource
from megachiar.data.storage.files import CHECKSUM_BLOCK, block_checksum
from megachiar.data.storage.manifest import VERIFYING_THREADS, altered_block, recorded_checksums
from megachiar.errors import UserError

BYTES_PER_SECOND = 200e6
"""Rate at which a rank reads in the background, so that it leaves the disk to the samples."""
_LOWEST_PRIORITY = 19


class DataBlock(NamedTuple):
    """One block of a file: block ``number`` of ``path``, with the SHA-256 that its manifest records."""

    path: Path
    number: int
    checksum: str

    @property
    def size(self) -> int:
        """Return the bytes of the block as the file is now; 0 if it cannot be looked at, of which ``check`` tells."""
        try:
            return max(0, min(CHECKSUM_BLOCK, self.path.stat().st_size - self.number * CHECKSUM_BLOCK))
        except OSError:
            return 0

    def check(self) -> None:
        """Read the block, and compare it with its checksum.

        Raises:
            UserError: the block is not the one that was written, or cannot be read. The message names its bytes.
        """
        found = block_checksum(self.path, self.number * CHECKSUM_BLOCK)
        if found != self.checksum:
            raise altered_block(self.path, self.number, found, self.checksum)


def blocks_of(sources: Iterable[TokenSource]) -> list[DataBlock]:
    """Return every block of the files of ``sources``, each file once."""
    blocks = {}
    for source in sources:
        if source.manifest is not None:
            for path, recorded in recorded_checksums(source.prefix, source.manifest):
                blocks[path.resolve()] = [DataBlock(path, number, checksum) for number, checksum in enumerate(recorded)]
    return [block for of_file in blocks.values() for block in of_file]


def find_altered(blocks: Sequence[DataBlock], on_bytes: Callable[[int], None] = lambda size: None) -> UserError | None:
    """Check ``blocks`` with several threads; return the error of the first that is not what was written.

    Args:
        blocks: to check.
        on_bytes: is called with the size in bytes of each block that is checked.
    """

    def problem(block: DataBlock) -> UserError | None:
        try:
            block.check()
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor(VERIFYING_THREADS) as pool:
        for block, error in zip(blocks, pool.map(problem, blocks), strict=True):
            if error is not None:
                return error
            on_bytes(block.size)
    return None


class BackgroundCheck:
    """Check blocks in a thread of the lowest priority, in a ``with`` block that ends the thread.

    Attributes:
        problem: what the thread found; None as long as it found nothing.

    Args:
        blocks: to check, each once. The first one is drawn by chance: of a run that is stopped and started again, other
            blocks are then checked first each time.
    """

    def __init__(self, blocks: Sequence[DataBlock]):
        first = random.randrange(len(blocks)) if blocks else 0
        self._blocks = [*blocks[first:], *blocks[:first]]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._check, name="megachiar-data-check", daemon=True)
        self.problem: UserError | None = None

    def wait(self) -> None:
        """Wait until all blocks are checked."""
        self._thread.join()

    def __enter__(self) -> BackgroundCheck:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._stop.set()

    def _check(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # Linux gives each thread a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        for block in self._blocks:
            began = time.monotonic()
            try:
                block.check()
            except UserError as error:
                self.problem = error
                return
            if self._stop.wait(max(0.0, block.size / BYTES_PER_SECOND - (time.monotonic() - began))):
                return
