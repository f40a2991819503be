"""How far each cell of a sweep is, told from its files alone."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from megachiar.checkpoint.format import CONFIG_FILE, complete_checkpoints, read_state
from megachiar.config import RunConfig, load_config
from megachiar.config.identity import config_digest, deciding_keys
from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.errors import UserError
from megachiar.sweeps.cell_data import other_data
from megachiar.sweeps.cells import Cell
from megachiar.sweeps.measured import read_measured
from megachiar.training.run_lock import DEAD_AFTER_S, read_locks
from megachiar.training.run_result import RunResult, read_result

FAILED = ".failed.json"
State = Literal["finished", "running", "changed", "waiting", "failed", "stopped", "new"]
_OF_THE_TEST = ("data.test.", "checkpoint.keep_best")
_NAMED = 3  # keys that a message names


@dataclass(frozen=True)
class CellStatus:
    """How far a cell is.

    Attributes:
        cell: it.
        state: finished: its result is there. running: a process holds its run folder. changed: the run folder holds a
            run of another config, or on other data. waiting: another cell must be finished first. failed: its last run
            ended with an error. stopped: there are checkpoints, and steps are left. new: nothing is there.
        detail: the rest in words; may be empty.
        config: of its run; None as long as something has to be measured for it.
        result: of its run; None unless it is finished.
    """

    cell: Cell
    state: State
    detail: str = ""
    config: RunConfig | None = None
    result: RunResult | None = None


NOTHING_KNOWN: Mapping[str, CellStatus] = MappingProxyType({})


def status_of(cell: Cell, known: Mapping[str, CellStatus] = NOTHING_KNOWN) -> CellStatus:
    """Return how far a cell is.

    Args:
        cell: of a sweep.
        known: the answer for cells whose results lie elsewhere, by name.

    Raises:
        UserError: its config has problems, or its files cannot be read.
    """
    if cell.name in known:
        return known[cell.name]
    before = [status_of(source, known) for source in cell.sources]
    late = [status.cell.name for status in before if status.state != "finished"]
    measured = None
    if before:
        digests = {s.cell.variant.name: config_digest(s.config) for s in before if s.config is not None}
        record = read_measured(cell, digests) if len(digests) == len(before) else None
        if record is None:
            return _unmeasured(cell, late)
        measured = record.keys
    config = cell.config(measured)
    if (running := running_process(cell)) is not None:
        return CellStatus(cell, "running", running, config)
    return _from_files(cell, config)


def _unmeasured(cell: Cell, late: list[str]) -> CellStatus:
    if _holds_a_run(cell):
        return CellStatus(cell, "changed", "what was measured for it was asked for or measured otherwise")
    if late:
        return CellStatus(cell, "waiting", f"for {', '.join(late)}")
    return CellStatus(cell, "new", "is to be measured first")


def _from_files(cell: Cell, config: RunConfig) -> CellStatus:
    try:
        result = read_result(cell.run)
    except UserError:  # the run measures itself anew
        result = None
    if result is not None and result.config_digest == config_digest(config):
        if (path := other_data(result, config)) is not None:
            return CellStatus(cell, "changed", f"was trained or measured on another dataset {path}", config)
        return CellStatus(cell, "finished", "", config, result)
    checkpoints = complete_checkpoints(cell.run / "checkpoints")
    if checkpoints:
        differing = _differing_keys(load_config(checkpoints[-1] / CONFIG_FILE), config)
    elif result is not None:
        differing = _differing_keys(load_config(cell.run / "config.yaml"), config) or ["its config"]
    else:
        differing = []
    if any(not key.startswith(_OF_THE_TEST) for key in differing) or (differing and not checkpoints):
        more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
        return CellStatus(cell, "changed", f"differs in {', '.join(differing[:_NAMED])}{more}", config)
    step = read_state(checkpoints[-1]).step if checkpoints else 0
    if (code := read_failure(cell)) is not None:
        return CellStatus(cell, "failed", f"exit code {code}, step {step:,}, see {cell.file('.log')}", config)
    if checkpoints:
        return CellStatus(cell, "stopped", f"at step {step:,}", config)
    return CellStatus(cell, "new", "", config)


def _differing_keys(held: RunConfig, wanted: RunConfig) -> list[str]:
    ours, theirs = deciding_keys(wanted), deciding_keys(held)
    return [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]


def is_new(cell: Cell) -> bool:
    """Return whether nothing of a cell's run is there yet."""
    return not cell.run.exists()


def _holds_a_run(cell: Cell) -> bool:
    return (cell.run / "results.json").exists() or bool(complete_checkpoints(cell.run / "checkpoints"))


def running_process(cell: Cell) -> str | None:
    """Return which process trains in the run folder of a cell, in words; None if none does.

    Of a process on another machine the heartbeat tells, by this machine's clock. One whose launcher is gone ends
    within seconds, and the next run waits for it.
    """
    for lock in read_locks(cell.run) if cell.run.is_dir() else []:
        runs = None if lock.owner is None else lock.owner.process.runs()
        if runs and lock.owner is not None and lock.owner.is_orphan():
            continue
        if runs or (runs is None and time.time() - lock.heartbeat < DEAD_AFTER_S):
            return str(lock.owner or "a process that writes no readable lock")
    return None


def record_failure(cell: Cell, code: int) -> None:
    """Record that the run of a cell ended with an exit code that is none of 0 and 75."""
    write_atomically(cell.file(FAILED), json.dumps({"exit_code": code}).encode() + b"\n")


def forget_failure(cell: Cell) -> None:
    """Remove the record of a failure."""
    cell.file(FAILED).unlink(missing_ok=True)


def read_failure(cell: Cell) -> int | None:
    """Return the exit code with which the last run of a cell failed; None if it did not."""
    try:
        record = json.loads(read_regular(cell.file(FAILED)))
        return int(record["exit_code"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
