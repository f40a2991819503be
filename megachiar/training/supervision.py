"""What stands beside the training loop of a rank: signals, the run folder's lock, the watch over others, events."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megachiar.activity import Activity
from megachiar.errors import UserError
from megachiar.stop_signals import StopSignals
from megachiar.topology import Topology, raise_together
from megachiar.training.run_events import RunEvents
from megachiar.training.run_lock import RunLock
from megachiar.training.watch import PeerWatch


@dataclass(frozen=True)
class Supervision:
    """What watches over a rank while it trains.

    Attributes:
        signals: that stop the run after a checkpoint.
        lock: of the run folder, on rank 0; None on the others.
        watch: over the other ranks.
        activity: of this rank's main thread, which the trainer keeps up to date.
        events: of the run, which rank 0 writes.
    """

    signals: StopSignals
    lock: RunLock | None
    watch: PeerWatch
    activity: Activity
    events: RunEvents


@contextlib.contextmanager
def hold_run_folder(folder: Path, topology: Topology, log: Callable[[str], None]) -> Iterator[RunLock | None]:
    """Hold the lock of the run folder as long as this context lasts; every rank enters it, after the ranks have met.

    Yields:
        The lock on rank 0, None on the others.

    Raises:
        LaunchError: another run works in the folder, or rank 0 cannot write there. Every rank raises it.
    """
    problem = None
    lock = RunLock(folder, topology.world_size, log) if topology.is_main else None
    with contextlib.ExitStack() as stack:
        try:
            if lock is not None:
                stack.enter_context(lock)
        except UserError as error:
            problem = error
        raise_together(problem)
        yield lock
