"""Whether a run trains, is done, or has died: from its lock, its events and the time of its last record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megachiar.errors import UserError
from megachiar.training.run_events import ENDS, FAILED, FINISHED, STOPPED
from megachiar.training.run_lock import DEAD_AFTER_S, LockFile, read_locks

Word = Literal["waiting", "starting", "running", "silent", "finished", "stopped", "failed", "killed", "not running"]


@dataclass(frozen=True)
class RunState:
    """What a run does at the moment.

    Attributes:
        word: the state. ``silent`` is a run that lives and has written nothing for a while.
        detail: what there is to say beside it; may be empty.
    """

    word: Word
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.detail}" if self.detail else self.word


def state_of(
    folder: Path, last_event: dict[str, Any] | None, written: float | None, silent_after: float, is_complete: bool
) -> RunState:
    """Return the state of the run in ``folder``.

    Args:
        folder: the run folder; it may be missing.
        last_event: the newest event; None of a run that has none.
        written: time of the newest record or event, in seconds since 1970; None without any.
        silent_after: seconds without a record after which a living run counts as silent.
        is_complete: whether the run has its result, or has recorded its last step.
    """
    try:
        locks = read_locks(folder) if folder.is_dir() else []
    except UserError as error:
        return RunState("not running", f"its lock cannot be read: {error.problem}")
    if owner := next((lock for lock in locks if _lives(lock)), None):
        return _of_living(written, silent_after, max(0.0, time.time() - owner.heartbeat))
    if last_event is not None and last_event["kind"] in ENDS:
        return _of_end(last_event)
    if locks:
        who = locks[-1].owner
        return RunState("killed", f"{who.process} is gone" if who is not None else "")
    if is_complete:
        return RunState("finished")
    if written is None:
        return RunState("waiting", "no metrics yet" if folder.is_dir() else "there is no such folder yet")
    return RunState("killed" if last_event is not None else "not running")


def _lives(lock: LockFile) -> bool:
    runs = None if lock.owner is None else lock.owner.process.runs()
    return time.time() - lock.heartbeat < DEAD_AFTER_S if runs is None else runs


def _of_living(written: float | None, silent_after: float, heartbeat_age: float) -> RunState:
    if written is None:
        return RunState("starting")
    age = time.time() - written
    if age < silent_after:
        return RunState("running")
    sign = f", last sign of life {duration(heartbeat_age)} ago" if heartbeat_age > DEAD_AFTER_S else ""
    return RunState("silent", f"nothing written for {duration(age)}{sign}")


def _of_end(event: dict[str, Any]) -> RunState:
    reason = event.get("reason") if isinstance(event.get("reason"), str) else ""
    words: dict[str, Word] = {FINISHED: "finished", STOPPED: "stopped", FAILED: "failed"}
    return RunState(words[event["kind"]], f"{'by ' if event['kind'] == STOPPED and reason else ''}{reason}")


def duration(seconds: float) -> str:
    """Return a time such as ``45s``, ``3m12s``, ``2h05m`` or ``3d04h``."""
    whole = round(max(0.0, seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole // 60 % 60:02d}m"
    return f"{whole // 86_400}d{whole // 3600 % 24:02d}h"


def newest(times: Sequence[float | None]) -> float | None:
    """Return the newest of times, None where none is known."""
    return max((found for found in times if found is not None), default=None)
