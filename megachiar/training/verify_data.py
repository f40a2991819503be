"""Share out among the ranks which blocks of the datasets each compares with their checksums, and compare before a run.

Ranks that read the same file share its blocks. A rank with a copy of its own, such as one on its node's disk, shares
with nobody, so that every copy is read whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megachiar.activity import Activity, Stage
from megachiar.data.sampling.dataset import TokenSource
from megachiar.data.sampling.verification import DataBlock, blocks_of, find_altered
from megachiar.data.storage.manifest import VERIFYING_THREADS
from megachiar.errors import UserError
from megachiar.progress import ByteProgress
from megachiar.topology import raise_together

ROUND_S = 5.0
"""Seconds after which the ranks ask one another whether to go on, or earlier where they wait less for one another."""

Identity = tuple[int, ...]
"""What a copy of a file has of its own: two copies differ in it, and all nodes see the same of one shared file."""


def blocks_of_rank(sources: Sequence[TokenSource]) -> list[DataBlock]:
    """Return the blocks of the files of ``sources`` that this rank compares; every rank calls this function.

    Each block of each copy of a file is compared by one of the ranks that read the copy.
    """
    blocks = blocks_of(sources)
    mine = [_identity(path) for path in dict.fromkeys(block.path for block in blocks)]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return share_of_blocks(blocks, everyone, dist.get_rank())


def share_of_blocks(blocks: Sequence[DataBlock], identities: Sequence[list[Identity]], rank: int) -> list[DataBlock]:
    """Return the blocks that ``rank`` compares.

    Args:
        blocks: of all files, the same on every rank but for their paths.
        identities: of each rank's files, in the order in which ``blocks`` has them.
        rank: of this process.
    """
    shares, mine = [], identities[rank]
    for index, path in enumerate(dict.fromkeys(block.path for block in blocks)):
        readers = [reader for reader, files in enumerate(identities) if files[index : index + 1] == [mine[index]]]
        of_file = [block for block in blocks if block.path == path]
        shares += of_file[readers.index(rank) :: len(readers)]
    return shares


def _identity(path: Path) -> Identity:
    try:
        found = os.stat(path)
    except OSError:  # whoever reads it says why it cannot
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def verify_data(
    blocks: Sequence[DataBlock],
    activity: Activity,
    stop: Callable[[], bool],
    reduce_sum: Callable[[list[float]], list[float]],
    timeout_s: float,
    show_progress: bool,
) -> bool:
    """Compare blocks with their checksums; every rank calls this function with its own.

    Args:
        blocks: of this rank.
        activity: of this rank, which makes progress with every block.
        stop: whether this rank is asked to stop.
        reduce_sum: returns the sum of each value over all ranks.
        timeout_s: seconds that ranks wait for one another.
        show_progress: show share, rate and time left of this rank on standard error.

    Returns:
        Whether all ranks are done; else one of them was asked to stop.

    Raises:
        LaunchError: a block of any rank is not what was written. Every rank raises it.
    """
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += 1
        activity.begin(f"verifies the data, block {done} of {len(blocks)}", Stage.START, step=0, item=3)
        progress.advance(size)

    with (
        open(os.devnull, "w") as nowhere,
        ByteProgress(
            "verifying the data", sum(block.size for block in blocks), None if show_progress else nowhere
        ) as progress,
    ):
        while True:
            error = _verify_until(time.monotonic() + min(ROUND_S, timeout_s / 4), blocks, lambda: done, advance)
            ended = error is not None or done == len(blocks)
            stops, at_work, errors = reduce_sum([float(stop()), float(not ended), float(error is not None)])
            if errors:
                raise_together(error)
            if stops or not at_work:
                return not stops


def _verify_until(
    until: float, blocks: Sequence[DataBlock], done: Callable[[], int], advance: Callable[[int], None]
) -> UserError | None:
    """Compare blocks that are not done until a time; return the error of the first altered one."""
    while done() < len(blocks) and time.monotonic() < until:
        error = find_altered(blocks[done() : done() + VERIFYING_THREADS], advance)
        if error is not None:
            return error
    return None
