"""Say in words what happened to a run: its events, or of a run of an earlier version what its metrics tell."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megachiar.training.json_lines import finite
from megachiar.training.metrics import ROLLBACK, SKIPPED
from megachiar.training.run_events import BAD_STEP, FAILED, FINISHED, ROLLED_BACK, SAVED, START, STOPPED

Record = Mapping[str, Any]
ALARMING = {BAD_STEP, ROLLED_BACK, FAILED, SKIPPED}


@dataclass(frozen=True)
class Happening:
    """Something that happened to a run.

    Attributes:
        time: in seconds since 1970; None where it is not known.
        step: at which it happened.
        kind: of the event.
        text: in words.
    """

    time: float | None
    step: int
    kind: str
    text: str

    @property
    def is_alarming(self) -> bool:
        """Whether a reader should look at it."""
        return self.kind in ALARMING

    @property
    def clock(self) -> str:
        """The time of day where the reader is, such as ``14:05:09``; nothing where it is not known."""
        return "" if self.time is None else time.strftime("%H:%M:%S", time.localtime(self.time))


def happenings_of(events: Sequence[Record], marks: Sequence[Record]) -> list[Happening]:
    """Return what happened, oldest first.

    Args:
        events: of ``events.jsonl``; empty of a run of an earlier version.
        marks: rollbacks and left-out steps of ``metrics.jsonl``, which are told where there are no events.
    """
    found = [_happening(record) for record in (events or marks)]
    return [happening for happening in found if happening is not None]


def _happening(record: Record) -> Happening | None:
    kind = record["kind"]
    describe = _WORDS.get(kind)
    if describe is None:
        return None
    return Happening(moment_of(record), record["step"], kind, describe(record))


def moment_of(record: Record) -> float | None:
    """Return the time of an event in seconds since 1970; None where it has none, or none that a clock shows."""
    moment = finite(record.get("time"))
    return moment if moment is not None and 0 <= moment < 1 << 40 else None


def _started(record: Record) -> str:
    words = {"fresh": "started", "resumed": f"went on from step {record['step']:,}"}
    changed = record.get("changed")
    count = len(changed) if isinstance(changed, dict) else 0
    keys = f", {count} {'key' if count == 1 else 'keys'} of the config changed" if count else ""
    return words.get(str(record.get("from")), "started from another run") + keys


def _saved(record: Record) -> str:
    seconds = finite(record.get("seconds"))
    return f"saved step {record['step']:,}" + (f" in {seconds:.1f} s" if seconds is not None else "")


def _because(what: str) -> Callable[[Record], str]:
    return lambda record: what + (f": {record['reason']}" if record.get("reason") else "")


_WORDS: dict[str, Callable[[Record], str]] = {
    START: _started,
    SAVED: _saved,
    BAD_STEP: lambda record: f"step {record['step']:,}: {record.get('reason')}: {record.get('action')}",
    ROLLED_BACK: lambda record: f"went back from step {record.get('from_step')} to {record['step']:,}",
    SKIPPED: lambda record: f"step {record['step']:,} left out",
    FINISHED: lambda record: f"finished after step {record['step']:,}",
    STOPPED: lambda record: f"stopped by {record.get('reason')} after step {record['step']:,}",
    FAILED: _because("failed"),
}
assert ROLLBACK == ROLLED_BACK, "one word for one thing, in both files"
