"""Where a run starts: decided once, by rank 0, and told to all ranks.

the run folder has a whole checkpoint      resumed: go on from its newest (refused with checkpoint.resume: never)
else, checkpoint.load_from is given        weights, or with checkpoint.load: all everything, from there
else                                       fresh
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from megachiar.checkpoint.format import STATE_FILE, complete_checkpoints, find_damage, locate_checkpoint, read_state
from megachiar.config import RunConfig
from megachiar.errors import UserError, disk_errors
from megachiar.topology import LaunchError, Topology, raise_together

VISIBLE_WITHIN_S = 10.0
"""Seconds that another host may take to see what a shared file system shows rank 0."""
_SHARE_THE_FOLDER = "start all ranks in one working directory, on a file system that all hosts mount at the same path"


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        kind: fresh, from the weights of another run, from all that another run saved, or resumed from its own folder.
        path: the checkpoint; None for a fresh start.
        step: optimizer steps that are taken already.
    """

    kind: Literal["fresh", "weights", "all", "resumed"]
    path: Path | None = None
    step: int = 0

    @property
    def continues(self) -> bool:
        """Whether optimizer, step and position in the data come from the checkpoint too."""
        return self.kind in ("all", "resumed")


def resolve_start(config: RunConfig, topology: Topology, say: Callable[[str], None]) -> Start:
    """Let rank 0 decide where the run starts and tell all ranks; every rank calls it.

    Args:
        config: of the run.
        topology: of its ranks.
        say: prints a line of the log.

    Raises:
        LaunchError: on every rank alike: there is nothing to start from, ``checkpoint.resume`` forbids it, or a rank
            does not see the checkpoint.
    """
    decided = _from_rank_0(_decide(config, say) if topology.is_main else None)
    if isinstance(decided, UserError):
        raise LaunchError(decided.where, decided.problem, decided.remedy)
    if decided.start.path is not None:
        raise_together(_why_unseen(decided))
    return decided.start


def find_start(config: RunConfig, say: Callable[[str], None] = lambda line: None) -> Start:
    """Where the run of ``config`` would start, by what this process sees.

    Raises:
        UserError: ``checkpoint.load_from`` holds no whole checkpoint; or one is of another format.
    """
    own = _newest(config.checkpoint_folder, say)
    if own is not None:
        return Start("resumed", own, read_state(own).step)
    if config.checkpoint.load_from is None:
        return Start("fresh")
    other = locate_checkpoint(config.checkpoint.load_from)
    if config.checkpoint.load == "weights":
        return Start("weights", other)
    return Start("all", other, read_state(other).step)


def check_shared_folder(folder: Path, topology: Topology) -> None:
    """Check that all ranks have the same run folder; every rank calls it. Rank 0 makes it.

    Raises:
        LaunchError: on every rank alike: it cannot be written, or a rank does not see what rank 0 wrote there.
    """
    if topology.world_size == 1:
        return
    mark = folder.absolute() / _from_rank_0(f".seen-by-all-{secrets.token_hex(8)}")
    raise_together(_put_mark(mark) if topology.is_main else None)
    try:
        seen = topology.is_main or _within(VISIBLE_WITHIN_S, mark.exists)
        unseen = UserError(mark.parent, "is another folder than rank 0's, or cannot be seen", _SHARE_THE_FOLDER)
        raise_together(None if seen else unseen)
    finally:
        if topology.is_main:
            mark.unlink(missing_ok=True)


def _put_mark(path: Path) -> UserError | None:
    try:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    except UserError as error:
        return error
    return None


class _Decision(NamedTuple):
    """A start, and by what its checkpoint is known from another one of that name."""

    start: Start
    fingerprint: str | None


def _decide(config: RunConfig, say: Callable[[str], None]) -> _Decision | UserError:
    try:
        start = find_start(config, say)
    except UserError as error:
        return error
    if start.kind == "resumed" and config.checkpoint.resume == "never":
        return UserError(
            config.logging.folder,
            f"holds {start.path.name} and checkpoint.resume is never",
            "choose another logging.folder, remove this one, or set checkpoint.resume to auto",
        )
    return _Decision(start, _fingerprint(start.path) if start.path is not None else None)


def _from_rank_0(value: Any) -> Any:
    """Rank 0's ``value`` on every rank; every rank calls it."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    for path in sorted(folder.glob("step_*")):
        if not path.name.endswith(".incomplete") and (problem := find_damage(path)):
            say(f"[yellow]passing over {path}: {problem}[/]")
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def _fingerprint(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / STATE_FILE).read_bytes()).hexdigest()


def _why_unseen(decision: _Decision) -> UserError | None:
    """Why this rank cannot start from the checkpoint that rank 0 chose; None if it can."""
    checkpoint = decision.start.path
    try:
        if _within(VISIBLE_WITHIN_S, lambda: _difference(checkpoint, decision.fingerprint) is None):
            return None
        problem = _difference(checkpoint, decision.fingerprint)
    except UserError as error:
        return error
    told = f"rank 0 starts from this checkpoint, but here {problem}"
    return UserError(checkpoint.absolute(), told, _SHARE_THE_FOLDER)


def _difference(checkpoint: Path, fingerprint: str) -> str | None:
    """How ``checkpoint`` differs from the whole one of that fingerprint; None if it does not."""
    problem = find_damage(checkpoint)
    if problem is None and _fingerprint(checkpoint) != fingerprint:
        return "stands another one"
    return problem


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` becomes true in so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
