"""Find the rank that holds the others up a little in every step: the straggler.

A rank's own time is what a step takes without the time in which the rank waits for others. All ranks finish a step
together, so that the others lose what the slowest needs longer than they do:

    rank 0   |== own ==|... waits ...|
    rank 1   |======== own ==========|        lost share = (own of rank 1 - median own) / step
    rank 2   |== own ===|.. waits ...|

Pipeline stages have different work by design, so that a rank is compared with the ranks of its own stage.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

from megachiar.topology import Topology
from megachiar.training.heartbeat import Heartbeat

FEWEST_STEPS = 5
"""Steps over which a rank's times are averaged at least."""
WORTH_A_LINE = 0.1
"""Share of the time from which on a straggler is named in the log."""
LINE_EVERY_S = 300.0
"""Seconds until the same straggler is named again."""


@dataclass(frozen=True)
class Straggler:
    """The rank with the longest own time among the ranks of its stage.

    Attributes:
        rank: its number.
        process: its host and process id.
        own_s: seconds of its own that it needs for a step.
        median_s: what the ranks of its stage need, the lower median.
        lost_share: share of a step in which the others wait for it.
    """

    rank: int
    process: str
    own_s: float
    median_s: float
    lost_share: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} ({self.process}) is slow: {self.own_s:.3f} s of its own a step, the median is "
            f"{self.median_s:.3f} s; {self.lost_share:.0%} of the time is lost in waiting for it"
        )


@dataclass(frozen=True)
class _Totals:
    steps: int
    step_s: float
    waited_s: float

    def since(self, earlier: _Totals) -> _Totals:
        return _Totals(
            steps=self.steps - earlier.steps,
            step_s=self.step_s - earlier.step_s,
            waited_s=self.waited_s - earlier.waited_s,
        )


class StepTimes:
    """Averages the ranks' times over the steps between two questions.

    Args:
        topology: of the run.
    """

    def __init__(self, topology: Topology):
        self._ranks_per_stage = topology.world_size // topology.pipeline_size
        self._before: dict[int, _Totals] = {}

    def straggler(self, heartbeats: Mapping[int, Heartbeat]) -> Straggler | None:
        """Return the slowest rank since the last answer; None if too few steps have passed, or one rank is alone.

        The first answer only begins the measurement, since the first steps of a run warm up.
        """
        totals = {rank: _Totals(b.steps, b.step_seconds, b.waited_seconds) for rank, b in heartbeats.items()}
        if len(totals) < 2 or any(total.steps == 0 for total in totals.values()):
            return None
        if not self._before:
            self._before = totals
            return None
        spans = {rank: total.since(self._before[rank]) for rank, total in totals.items()}
        if any(span.steps < FEWEST_STEPS for span in spans.values()):
            return None
        self._before = totals
        own = {rank: (span.step_s - span.waited_s) / span.steps for rank, span in spans.items()}
        stages: dict[int, list[int]] = {}
        for rank in own:
            stages.setdefault(rank // self._ranks_per_stage, []).append(rank)
        medians = {stage: statistics.median_low([own[rank] for rank in ranks]) for stage, ranks in stages.items()}
        rank = max(own, key=lambda rank: own[rank] - medians[rank // self._ranks_per_stage])
        median = medians[rank // self._ranks_per_stage]
        step = spans[rank].step_s / spans[rank].steps
        return Straggler(
            rank=rank,
            process=heartbeats[rank].process,
            own_s=own[rank],
            median_s=median,
            lost_share=max(0.0, (own[rank] - median) / step) if step else 0.0,
        )


def measures_of(straggler: Straggler | None) -> dict[str, float | None]:
    """Return what metrics.jsonl holds of a straggler; None where it cannot be told yet or a rank is alone."""
    return {
        "slowest_rank": None if straggler is None else straggler.rank,
        "slowest_rank_lost_share": None if straggler is None else straggler.lost_share,
    }


class StragglerLog:
    """Decides when the log names a straggler: when it is another one than before, and else now and then."""

    def __init__(self) -> None:
        self._named: int | None = None
        self._at = 0.0

    def line(self, straggler: Straggler | None) -> str | None:
        """Return the line for the log; None if nothing is worth saying."""
        if straggler is None or straggler.lost_share < WORTH_A_LINE:
            return None
        now = time.monotonic()
        if straggler.rank == self._named and now - self._at < LINE_EVERY_S:
            return None
        self._named, self._at = straggler.rank, now
        return str(straggler)
