"""Save the checkpoints of a run, in a thread while training goes on or at once.

    training   |- step 9 -|- step 10 -| snapshot |- step 11 -|- step 12 -|- step 13 -|
    thread                                       |-- write, sync, agree, rename --|  ^ all ranks learn how it went

The snapshot is a copy in the host's memory of what this rank writes, and the only time that training waits. One save at
a time is under way: the next one waits for it, so that no more than one copy exists, and uses the same memory. The
threads of the ranks talk over a gloo group of their own. After each step the ranks agree in their main threads whether
all have finished, and then all learn of a failure at the same step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from rich.markup import escape

from megachiar.checkpoint.format import NO_STEPS, NOTHING_SPENT, RecentSteps, Spent
from megachiar.checkpoint.save import SaveError, remove_surplus, write_checkpoint
from megachiar.checkpoint.sharded_tensors import HostMemory
from megachiar.checkpoint.snapshot import Snapshot, take_snapshot
from megachiar.data.sampling.history import DataHistory
from megachiar.data.sampling.history_records import SourceRecord
from megachiar.engine.engine import Engine


class CheckpointSaver:
    """Save a run's checkpoints, in a ``with`` block that waits for the last of them; every rank calls each method.

    Attributes:
        failures: saves that failed and that ``checkpoint.on_failure: continue`` passed over.
        newest_step: step of the newest checkpoint that is complete; None before the first.
        memory: keeps the memory of a snapshot for the next one; None if saves are not asynchronous.

    Args:
        engine: holds weights, optimizer state and loss scale.
        newest_step: step of the checkpoint that the run goes on from; None for a new run.
        log: prints a line of the log, in rich's markup.
        report: is called with each new checkpoint and the seconds that saving it took.
        spared: returns the name of an old checkpoint that is not to be removed; None for none. Rank 0 calls it in the
            thread of a save.
        validation_data: what the validation sets of the run hold, by name.
        maximised: names of measures, beside the losses on these sets, of which the highest is the best.
    """

    def __init__(
        self,
        engine: Engine,
        newest_step: int | None,
        log: Callable[[str], None],
        report: Callable[[Path, float], None],
        spared: Callable[[], str | None] = lambda: None,
        validation_data: Mapping[str, SourceRecord] | None = None,
        maximised: Collection[str] = (),
    ):
        self.failures = 0
        self.newest_step = newest_step
        self.memory = HostMemory() if engine.config.checkpoint.asynchronous else None
        self._report, self._spared = report, spared
        self._validation_data, self._maximised = validation_data, maximised
        self._engine, self._log = engine, log
        self._config = engine.config.checkpoint
        timeout = timedelta(seconds=engine.config.training.communication_timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._save: _Save | None = None

    def save(
        self,
        step: int,
        data: DataHistory,
        validation: Mapping[str, float],
        recent: RecentSteps = NO_STEPS,
        auxiliary_samples: Mapping[str, int] | None = None,
        spent: Spent = NOTHING_SPENT,
        *,
        must_succeed: bool,
    ) -> None:
        """Save the checkpoint of ``step``, after the save before it has ended.

        Args:
            step: optimizer steps taken.
            data: what the run has read so far.
            validation: loss in nats a token on validation sets after this step, by name.
            recent: what the run compares its next steps with.
            auxiliary_samples: samples that each auxiliary task has read, by name; None where there is none.
            spent: what the run has spent so far.
            must_succeed: wait until the checkpoint is written, and raise a failure whatever ``on_failure`` says, since
                the run ends after it.

        Raises:
            SaveError: this save or the one before it failed, and the run ends with it.
        """
        self.wait()
        began = time.perf_counter()
        snapshot = take_snapshot(
            self._engine,
            step,
            data,
            validation,
            recent=recent,
            memory=self.memory,
            validation_data=self._validation_data,
            auxiliary_samples=auxiliary_samples,
            spent=spent,
            maximised=self._maximised,
        )
        self._save = _Save(snapshot, self._gather, self._engine.topology.is_main, began, self._spared)
        if must_succeed or not self._config.asynchronous:
            self._save.run()
            self._conclude(must_succeed)
        else:
            self._save.start()

    def poll(self) -> None:
        """Learn whether a save that is under way has ended on every rank, and how.

        Raises:
            SaveError: it failed, and ``checkpoint.on_failure`` is ``stop``.
        """
        if self._save is None:
            return
        ended = self._engine.sum_over_world([float(self._save.has_ended)])[0]
        if ended == self._engine.topology.world_size:
            self._conclude()

    def wait(self) -> None:
        """Wait until no save is under way.

        Raises:
            SaveError: it failed, and ``checkpoint.on_failure`` is ``stop``.
        """
        if self._save is not None:
            self._conclude()

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        if kind is None:
            self.wait()
        elif self._save is not None:  # the run fails for another reason, but this checkpoint is good
            self._save.join()

    def _conclude(self, must_succeed: bool = False) -> None:
        """Report how the save ended. Its outcome is the same on every rank."""
        assert self._save is not None
        save, self._save = self._save, None
        save.join()
        if save.error is None:
            assert save.path is not None
            self.newest_step = save.step
            self._report(save.path, save.seconds)
            for warning in save.warnings:
                self._log(f"[yellow]{escape(warning)}[/]")
            return
        if must_succeed or self._config.on_failure == "stop" or not isinstance(save.error, SaveError):
            raise save.error
        else:
            self.failures += 1
            problem = f"step {save.step} is not saved: {save.error.where}: {save.error.problem}"
            self._log(f"[yellow]{escape(problem)}. The run goes on; saves that failed so far: {self.failures}[/]")

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._engine.topology.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


class _Save:
    """One save, run at once or in a thread.

    Attributes:
        step: optimizer steps taken.
        path: of the checkpoint; None before it is written.
        error: with which the save failed; None if it did not.
        warnings: lines for the log about old checkpoints that could not be removed, on rank 0.
        seconds: what it took, from the beginning of its snapshot.

    Args:
        snapshot: what this rank writes.
        gather: returns the values of all ranks.
        is_main: whether this is rank 0.
        began: time by ``time.perf_counter`` at which the snapshot began.
        spared: see ``CheckpointSaver``.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        gather: Callable[[Any], list[Any]],
        is_main: bool,
        began: float,
        spared: Callable[[], str | None],
    ):
        self.step = snapshot.step
        self.seconds = 0.0
        self._began = began
        self.path: Path | None = None
        self.error: Exception | None = None
        self.warnings: list[str] = []
        self._snapshot: Snapshot | None = snapshot
        self._gather, self._is_main, self._spared = gather, is_main, spared
        self._thread = threading.Thread(target=self.run, name="megachiar-save", daemon=True)

    @property
    def has_ended(self) -> bool:
        """Return whether this rank is done."""
        return self._snapshot is None

    def start(self) -> None:
        """Run the save in a thread."""
        self._thread.start()

    def run(self) -> None:
        """Write the checkpoint, remove old ones, and let go of the snapshot."""
        assert self._snapshot is not None
        try:
            self.path = write_checkpoint(self._snapshot, self._gather, self._is_main)
            if self._is_main:
                self.warnings = remove_surplus(self.path, self._snapshot.config.checkpoint, self._spared())
        except Exception as error:
            self.error = error
        self.seconds = time.perf_counter() - self._began
        self._snapshot = None

    def join(self) -> None:
        """Wait until the save has ended."""
        if self._thread.ident is not None:
            self._thread.join()
