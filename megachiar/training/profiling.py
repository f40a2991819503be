"""Record some steps with PyTorch's profiler: ``RUN/profile/steps_50-55_rank_0.json.gz``, which Perfetto opens.

    step 49 | 50 ... 55 and what follows: evaluation, save | write the trace, say the ten dearest | 56

With ``profiling.memory`` a GPU's snapshot lies beside it, ``..._memory.pickle``, for https://pytorch.org/memory_viz.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch.profiler import ProfilerActivity, profile

from megachiar.config import RunConfig
from megachiar.config.profiling import outside
from megachiar.errors import UserError
from megachiar.topology import Topology

PHASES = (
    "data",
    "forward",
    "route",
    "attention",
    "dct",
    "rbf",
    "feed-forward",
    "loss",
    "backward",
    "optimizer",
    "save",
)
"""Names that ``phases.phase`` gives, in the order of a step."""
DEAREST = 10
_ALLOCATIONS = 200_000
"""Allocations that a snapshot of a GPU's memory goes back to."""


def check_profiling(config: RunConfig, topology: Topology) -> None:
    """Check the ranks and steps to record against those that the run has; every rank calls this function.

    Raises:
        UserError: the run has no such rank or step.
    """
    if config.profiling.steps is None:
        return
    if (problem := outside(config.profiling.steps[1], config.steps)) is not None:
        raise UserError("profiling.steps", *problem)
    if (most := max(config.profiling.ranks)) >= topology.world_size:
        raise UserError(
            "profiling.ranks",
            f"names rank {most}, but the run has {topology.world_size} ranks, counted from 0",
            f"name ranks below {topology.world_size}",
        )


class Profiler:
    """Records the steps that the config names, once, on the ranks that it names. A refused file is a warning.

    Args:
        config: of the run.
        rank: of this process.
        device: of this rank.
        log: prints a line of the log, in rich's markup.
    """

    def __init__(self, config: RunConfig, rank: int, device: torch.device, log: Callable[[str], None]):
        wanted = config.profiling.steps if rank in config.profiling.ranks else None
        self._first, self._last = wanted if wanted is not None else (0, -1)
        self._memory = config.profiling.memory
        self._folder = config.logging.folder / "profile"
        self._rank, self._device, self._log = rank, device, log
        self._profile: Any = None
        self._began_at = 0

    def begin_step(self, step: int) -> None:
        """Begin to record, if ``step`` is the first one to record."""
        if self._profile is not None or not self._first <= step <= self._last:
            return
        self._began_at = step
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            if self._memory:
                torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self._profile = profile(activities=activities, profile_memory=self._memory, acc_events=True)
        self._profile.start()

    def end_step(self, step: int) -> None:
        """Write the trace, if ``step`` was the last one to record."""
        if step >= self._last:
            self.close(step)

    def close(self, step: int) -> None:
        """Write what was recorded up to ``step``, also where the run stops in between; nothing is recorded later."""
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        self._last = -1
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        recorded.stop()
        name = f"steps_{self._began_at}-{step}_rank_{self._rank}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._write(recorded, name)
        except (OSError, RuntimeError) as error:
            self._log(
                f"[yellow]the profile {escape(str(self._folder / name))} was not written: {escape(str(error))}[/]"
            )
        else:
            self._log(f"profile of steps {self._began_at} to {step}: {escape(str(path))}, for https://ui.perfetto.dev")
        for line in describe(recorded, step - self._began_at + 1, self._device):
            self._log(escape(line))

    def _write(self, recorded: Any, name: str) -> Path:
        path, unfinished = self._folder / f"{name}.json.gz", self._folder / f"{name}.incomplete.json.gz"
        if self._memory and self._device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}_memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        recorded.export_chrome_trace(str(unfinished))
        os.replace(unfinished, path)
        return path


def describe(recorded: Any, steps: int, device: torch.device) -> list[str]:
    """Return lines for the log: the time of each phase, and the dearest operations by the time of their own.

    Args:
        recorded: a profile that has ended.
        steps: how many it recorded.
        device: whose time counts.
    """
    kind = "device" if device.type == "cuda" else "cpu"
    found = {row.key: row for row in recorded.key_averages()}
    phases = ", ".join(
        f"{name} {getattr(found[name], f'{kind}_time_total') / 1000 / steps:.2f}" for name in PHASES if name in found
    )
    operations = [row for name, row in found.items() if name not in PHASES]
    own = {row.key: getattr(row, f"self_{kind}_time_total") / 1000 / steps for row in operations}
    whole = sum(own.values()) or 1.0
    rows = [
        f"  {own[row.key]:10.3f} ms  {own[row.key] / whole:6.1%}  {row.count / steps:8.1f} calls  {row.key}"
        for row in sorted(operations, key=lambda row: -own[row.key])[:DEAREST]
    ]
    where = "GPU" if kind == "device" else "CPU"
    return [
        f"  phases, ms a step on the {where}, forward passes where they say nothing else: {phases}",
        f"  the {len(rows)} dearest operations, a step on the {where}:",
        *rows,
    ]
