"""Where a run starts: rank 0 decides it once and broadcasts the decision to all ranks.

the run folder has a complete checkpoint   resumed: continue from the newest one (refused with checkpoint.resume: never)
else, checkpoint.load_from is given        weights (the weights alone), or with checkpoint.load: all everything
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
"""Seconds that another host may take to see what rank 0 wrote to a shared file system."""
_SHARE_THE_FOLDER = "start all ranks in one working directory, on a file system that all hosts mount at the same path"


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        kind: ``fresh``; ``weights`` loads the weights of another run, ``all`` everything that another run saved, and
            ``resumed`` everything from the run's own folder.
        path: the checkpoint to load; None for a fresh start.
        step: optimizer steps taken before the start.
    """

    kind: Literal["fresh", "weights", "all", "resumed"]
    path: Path | None = None
    step: int = 0

    @property
    def is_own(self) -> bool:
        """Whether the run starts from a checkpoint in its own folder."""
        return self.kind == "resumed"

    @property
    def continues_from(self) -> Path | None:
        """The checkpoint whose optimizer, step and position in the data are loaded too; None if there is none."""
        return self.path if self.kind in ("all", "resumed") else None


def resolve_start(config: RunConfig, topology: Topology, log: Callable[[str], None]) -> Start:
    """Let rank 0 decide where the run starts, and return its decision; every rank calls this function.

    Args:
        config: of the run.
        topology: of the run's ranks.
        log: prints a line of the log.

    Raises:
        LaunchError: there is nothing to start from, ``checkpoint.resume`` forbids to resume, or a rank does not see the
            checkpoint. Every rank raises it.
    """
    decision = broadcast_from_rank_0(_decide(config, log) if topology.is_main else None)
    if isinstance(decision, UserError):
        raise LaunchError(decision.where, decision.problem, decision.remedy)
    if decision.start.path is not None:
        raise_together(_why_unseen(decision.start.path, decision.fingerprint))
    return decision.start


def find_start(config: RunConfig, log: Callable[[str], None] = lambda line: None) -> Start:
    """Return where the run of ``config`` would start, from what this process sees of the file system.

    Raises:
        UserError: ``checkpoint.load_from`` holds no complete checkpoint, or a checkpoint has another format.
    """
    own = _newest(config.checkpoint_folder, log)
    if own is not None:
        return Start("resumed", own, read_state(own).step)
    if config.checkpoint.load_from is None:
        return Start("fresh")
    try:
        other = locate_checkpoint(config.checkpoint.load_from)
    except UserError as error:
        raise LaunchError(f"checkpoint.load_from {error.where}", error.problem, error.remedy) from error
    if config.checkpoint.load == "weights":
        return Start("weights", other)
    return Start("all", other, read_state(other).step)


def check_resume(config: RunConfig, start: Start) -> None:
    """Check that ``checkpoint.resume`` allows the start.

    Raises:
        LaunchError: it forbids to resume, and the run folder has a checkpoint.
    """
    if start.path is not None and start.is_own and config.checkpoint.resume == "never":
        raise LaunchError(
            config.logging.folder,
            f"holds {start.path.name} and checkpoint.resume is never",
            "choose another logging.folder, remove this one, or set checkpoint.resume to auto",
        )


def check_shared_folder(folder: Path, topology: Topology) -> None:
    """Check that all ranks see the same run folder, which rank 0 creates; every rank calls this function.

    Raises:
        LaunchError: rank 0 cannot write to the folder, or a rank does not see what rank 0 wrote there. Every rank
            raises it.
    """
    if topology.world_size == 1:
        return
    mark = folder.absolute() / broadcast_from_rank_0(f".seen-by-all-{secrets.token_hex(8)}")
    raise_together(_write_mark(mark) if topology.is_main else None)
    try:
        seen = topology.is_main or _within(VISIBLE_WITHIN_S, mark.exists)
        unseen = UserError(mark.parent, "is not the folder that rank 0 sees, or cannot be read", _SHARE_THE_FOLDER)
        raise_together(None if seen else unseen)
    finally:
        if topology.is_main:
            mark.unlink(missing_ok=True)


def _write_mark(path: Path) -> UserError | None:
    try:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    except UserError as error:
        return error
    return None


class _Decision(NamedTuple):
    """Rank 0's decision.

    Attributes:
        start: where the run starts.
        fingerprint: hash of the checkpoint's record, which tells it from another one of the same name; empty for a
            fresh start.
    """

    start: Start
    fingerprint: str


def _decide(config: RunConfig, log: Callable[[str], None]) -> _Decision | UserError:
    try:
        start = find_start(config, log)
        check_resume(config, start)
    except UserError as error:
        return error
    return _Decision(start, fingerprint="" if start.path is None else _fingerprint(start.path))


def broadcast_from_rank_0(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank; every rank calls this function."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _newest(folder: Path, log: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint in ``folder``, or None; ``log`` names each damaged one."""
    for path in sorted(folder.glob("step_*")):
        if not path.name.endswith(".incomplete") and (problem := find_damage(path)):
            log(f"[yellow]ignoring the damaged checkpoint {path}: {problem}[/]")
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def _fingerprint(checkpoint: Path) -> str:
    return hashlib.sha256((checkpoint / STATE_FILE).read_bytes()).hexdigest()


def _why_unseen(checkpoint: Path, fingerprint: str) -> UserError | None:
    """Return why this rank cannot load the checkpoint that rank 0 chose; None if it can."""
    try:
        if _within(VISIBLE_WITHIN_S, lambda: _difference(checkpoint, fingerprint) is None):
            return None
        difference = _difference(checkpoint, fingerprint)
    except UserError as error:
        return error
    problem = f"rank 0 starts from this checkpoint, but on this rank {difference}"
    return UserError(checkpoint.absolute(), problem, _SHARE_THE_FOLDER)


def _difference(checkpoint: Path, fingerprint: str) -> str | None:
    """Return how ``checkpoint`` differs from the complete one with ``fingerprint``; None if it does not."""
    problem = find_damage(checkpoint)
    if problem is None and _fingerprint(checkpoint) != fingerprint:
        return "the path holds another checkpoint"
    return problem


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Return whether ``condition`` becomes true within ``seconds``."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True
