"""Find which rank holds the others up, and say who waits where.

A rank counts as stalled only while others need it: where all ranks compute, compile or read for a long time at once,
nobody waits for anybody, and the run goes on.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping

from megachiar.process_identity import state_of
from megachiar.training.heartbeat import Heartbeat

_STATES = {"T": "is stopped (SIGSTOP or Ctrl-Z)", "t": "is stopped by a debugger", "D": "waits for a disk or a device"}


def find_stalled(heartbeats: Mapping[int, Heartbeat], still_s: Mapping[int, float], limit_s: float) -> list[int]:
    """Return the ranks that hold others up, the lowest first; empty if the run goes on.

    Args:
        heartbeats: the newest one of each rank.
        still_s: seconds for which each rank has made no progress.
        limit_s: seconds after which that is too long.
    """
    waiting = [rank for rank, beat in heartbeats.items() if _waits(beat) and still_s[rank] > limit_s]
    busy = [rank for rank, beat in heartbeats.items() if not _waits(beat)]
    first = max(beat.place for beat in heartbeats.values())
    behind = [rank for rank in busy if still_s[rank] > limit_s and (waiting or heartbeats[rank].place < first)]
    return _last(behind or (waiting if len(waiting) == len(heartbeats) else []), heartbeats)


def find_culprits(heartbeats: Mapping[int, Heartbeat]) -> list[int]:
    """Return the ranks for which the others wait, after a collective has failed; empty if it cannot be told."""
    busy = [rank for rank, beat in heartbeats.items() if not _waits(beat) and not beat.end]
    return _last(busy, heartbeats) if len(busy) < len(heartbeats) else []


def _waits(beat: Heartbeat) -> bool:
    """Return whether a rank waits for others, or has given that up."""
    return beat.wait is not None or beat.failed is not None


def _last(ranks: Iterable[int], heartbeats: Mapping[int, Heartbeat]) -> list[int]:
    """Return those of the ranks that are furthest behind."""
    places = {rank: heartbeats[rank].place for rank in ranks}
    return sorted(rank for rank in places if places[rank] == min(places.values()))


def describe_rank(rank: int, beat: Heartbeat, what: str) -> str:
    """Return a rank with its process and what is to be said of it."""
    return f"rank {rank}{f' ({beat.process})' if beat.pid else ''} {what}"


def describe_activity(beat: Heartbeat) -> str:
    """Return what a rank does, to be read after "rank 3"."""
    what = f"waits in the {beat.wait}" if beat.wait else beat.doing
    return f"{what}{_step(beat)}"


def describe_stall(rank: int, beat: Heartbeat, seconds: float) -> str:
    """Return what a stalled rank does."""
    where = "" if beat.wait else f", at {beat.line}"
    return describe_rank(rank, beat, f"{describe_activity(beat)}{where}, without progress for {seconds:.0f} s")


def describe_others(heartbeats: Mapping[int, Heartbeat], named: Iterable[int]) -> str:
    """Return what the ranks do that are not ``named``, as in "ranks 0-2 wait in the gradient all-reduce, step 812"."""
    groups: dict[str, list[int]] = {}
    for rank, beat in sorted(heartbeats.items()):
        if rank in named or not beat.pid:
            continue
        if beat.wait:
            what = f"wait in the {beat.wait}{_step(beat)}"
        elif beat.failed:
            what = f"gave up waiting{_step(beat)}"
        else:
            what = f": {beat.doing}{_step(beat)}"
        groups.setdefault(what, []).append(rank)
    return "; ".join(_of_ranks(ranks, what) for what, ranks in groups.items())


def _step(beat: Heartbeat) -> str:
    said = beat.wait is None and f"step {beat.step}" in beat.doing
    return f", step {beat.step}" if beat.step and not said else ""


def _of_ranks(ranks: list[int], what: str) -> str:
    one = len(ranks) == 1
    if one and what.startswith("wait "):
        what = "waits" + what[4:]
    gap = "" if what.startswith(":") else " "
    return f"{'rank' if one else 'ranks'} {_ranges(ranks)}{gap}{what}"


def _ranges(numbers: list[int]) -> str:
    """Return sorted numbers in short, such as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def describe_state(beat: Heartbeat) -> str:
    """Return why a silent process of this machine is silent, such as that it is stopped; empty if nothing is known."""
    here = socket.gethostname() == beat.host
    state = _STATES.get(state_of(beat.pid) or "", "") if here else ""
    return f", and {state}" if state else ""
