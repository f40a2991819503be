"""Where a run starts: rank 0 decides it once and broadcasts the decision to all ranks.

checkpoint.resume names a step             resumed: go back to its checkpoint, unless the run has saved since it did
else, the run folder has checkpoints       resumed: continue from the newest whole one (refused with resume: never)
else, checkpoint.load_from is given        weights (the weights alone), or with checkpoint.load: all everything
else                                       fresh

Before it decides, rank 0 has every file of the checkpoint compared with its checksum. All ranks share the files out
among themselves. A checkpoint that is not whole is passed over; if none is whole, the run does not start.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch.distributed as dist
from rich.markup import escape

from megachiar.checkpoint.format import (
    STATE_FILE,
    damaged_checkpoint,
    find_damage,
    fingerprint_of,
    read_state,
    unlisted_files,
)
from megachiar.checkpoint.reading import (
    checkpoint_to_go_back_to,
    later_checkpoints,
    locate_checkpoint,
    newest_whole,
)
from megachiar.checkpoint.removal import set_aside
from megachiar.checkpoint.verify import Verify, find_damaged_file, find_unreadable, share_of_files, verify_alone
from megachiar.config import RunConfig
from megachiar.data.sampling.history import DataHistory
from megachiar.errors import UserError, disk_errors
from megachiar.topology import LaunchError, Topology, raise_together, shared_error
from megachiar.training.rollback_record import RollbackRecord, read_rollback

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
        rollback: rollbacks of the run to this checkpoint before it ended; None if there were none.
    """

    kind: Literal["fresh", "weights", "all", "resumed"]
    path: Path | None = None
    step: int = 0
    rollback: RollbackRecord | None = None

    @property
    def is_own(self) -> bool:
        """Whether the run starts from a checkpoint in its own folder."""
        return self.kind == "resumed"

    @property
    def history_after_rollback(self) -> DataHistory | None:
        """The history of the data as rollbacks to this checkpoint have left it; None if there were none."""
        return self.rollback.data if self.rollback is not None else None

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
        LaunchError: there is nothing to start from, ``checkpoint.resume`` forbids to resume, no checkpoint is whole, or
            a rank does not see the checkpoint. Every rank raises it.
    """
    if topology.is_main:
        message = broadcast_from_rank_0(_decide(config, topology, log))
    else:
        while isinstance(message := broadcast_from_rank_0(None), _Candidate):
            _verify_together(message, topology)
    if isinstance(message, UserError):
        raise LaunchError(message.where, message.problem, message.remedy)
    return message


def find_start(
    config: RunConfig, log: Callable[[str], None] = lambda line: None, verify: Verify = verify_alone
) -> Start:
    """Return where the run of ``config`` would start, from what this process sees of the file system.

    Args:
        config: of the run.
        log: is told of checkpoints that are passed over.
        verify: compares the files of a checkpoint with their checksums.

    Raises:
        UserError: there are checkpoints and none is whole, ``checkpoint.load_from`` holds no whole checkpoint, a
            checkpoint has another format, or the record of rollbacks is damaged.
    """
    folder, resume = config.checkpoint_folder, config.checkpoint.resume
    if isinstance(resume, int):
        own: Path | None = checkpoint_to_go_back_to(folder, resume, verify, log)
    else:
        own = newest_whole(folder, verify, log)
    if own is not None:
        return Start("resumed", own, read_state(own).step, read_rollback(config.logging.folder, own))
    if config.checkpoint.load_from is None:
        return Start("fresh")
    try:
        other = locate_checkpoint(config.checkpoint.load_from, verify, log)
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


def set_later_aside(config: RunConfig, start: Start, log: Callable[[str], None]) -> None:
    """Set the checkpoints of a run aside that are later than the one which it goes on from.

    They are damaged, or the run goes back behind them to the step that ``checkpoint.resume`` names. Left where they are
    they would count as the newest, and those that the run saves next would be removed for them.

    Rank 0 alone calls this function, when nothing refuses the start any more.

    Raises:
        UserError: the file system refuses to rename one.
    """
    if start.path is None or not start.is_own:
        return
    for path in later_checkpoints(config.checkpoint_folder, start.step):
        log(f"[yellow]going on from step {start.step}: {escape(str(path))} is now {set_aside(path).name}[/]")


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


class _Candidate(NamedTuple):
    """A checkpoint that rank 0 asks all ranks to verify.

    Attributes:
        path: of the checkpoint.
        fingerprint: hash of its record, which tells it from another one of the same name.
    """

    path: Path
    fingerprint: str


def _decide(config: RunConfig, topology: Topology, log: Callable[[str], None]) -> Start | UserError:
    """Return what rank 0 decides, or why it cannot; the other ranks wait for its messages."""

    def verify(path: Path) -> str | None:
        candidate = broadcast_from_rank_0(_Candidate(path, fingerprint_of(path)))
        found = _verify_together(candidate, topology, show_progress=True)
        if isinstance(found, UserError):
            raise found
        return found

    def warn(line: str) -> None:
        log(f"[yellow]{escape(line)}[/]")

    try:
        start = find_start(config, warn, verify)
        check_resume(config, start)
    except UserError as error:
        return error
    if start.path is not None:
        for name in unlisted_files(start.path, read_state(start.path)):
            warn(f"{start.path}: ignored {name}, which {STATE_FILE} does not list")
    return start


def _verify_together(candidate: _Candidate, topology: Topology, show_progress: bool = False) -> str | UserError | None:
    """Verify a checkpoint, each rank its share of the files; every rank calls this function.

    Args:
        candidate: the checkpoint.
        topology: of the run's ranks.
        show_progress: show how far this rank is with its share.

    Returns:
        What is wrong with the checkpoint, the same on every rank: None if it is whole, and an error if a rank does not
        see the checkpoint that rank 0 sees.
    """
    unseen = shared_error(_why_unseen(candidate.path, candidate.fingerprint))
    if unseen is not None:
        return unseen
    problem = _find_damage_in_share(candidate.path, topology, show_progress)
    problems: list[str | None] = [None] * topology.world_size
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found), None)


def check_whole(checkpoint: Path, topology: Topology) -> None:
    """Check that a checkpoint of this run is whole, on all ranks together; every rank calls this function.

    Raises:
        LaunchError: it is damaged, or a rank does not see it. Every rank raises it.
    """
    candidate = _Candidate(checkpoint, fingerprint_of(checkpoint)) if topology.is_main else None
    found = _verify_together(broadcast_from_rank_0(candidate), topology)
    if found is not None:
        error = found if isinstance(found, UserError) else damaged_checkpoint(checkpoint, found)
        raise LaunchError(error.where, error.problem, error.remedy)


def _find_damage_in_share(checkpoint: Path, topology: Topology, show_progress: bool) -> str | None:
    try:
        state = read_state(checkpoint)
    except UserError as error:  # it was damaged a moment ago
        return error.problem
    names = share_of_files(state, topology.rank, topology.world_size)
    problem = find_damaged_file(checkpoint, state, names, show_progress)
    return find_unreadable(checkpoint, state) if problem is None and topology.is_main else problem


def broadcast_from_rank_0(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank; every rank calls this function."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


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
    if problem is None and fingerprint_of(checkpoint) != fingerprint:
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
