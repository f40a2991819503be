"""What stands beside the training loop of a rank: signals, the run folder's lock, the watch over other ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megachiar.activity import Activity
from megachiar.stop_signals import StopSignals
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
    """

    signals: StopSignals
    lock: RunLock | None
    watch: PeerWatch
    activity: Activity
