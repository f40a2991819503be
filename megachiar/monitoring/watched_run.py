"""A run that is watched: all that its folder tells without torch, read again and again, each line once."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from megachiar.data.storage.regular_file import read_regular
from megachiar.errors import UserError, disk_errors
from megachiar.monitoring.growing_file import GrowingFile
from megachiar.monitoring.happenings import Happening, happenings_of
from megachiar.monitoring.run_history import RunHistory
from megachiar.monitoring.run_state import RunState, newest, state_of
from megachiar.training.metrics import METRICS_FILE, TRAIN
from megachiar.training.run_events import EVENTS_FILE, START

CONFIG_FILE, RESULT_FILE = "config.yaml", "results.json"
SIGNS = (METRICS_FILE, EVENTS_FILE, CONFIG_FILE, RESULT_FILE, "checkpoints")
"""What a run folder holds at least one of, or the lock of a run that starts."""
_MOST_EVENTS = 2000
_SILENT_S = 60.0
_RECENT = 20  # records that the time of a step is taken from


def check_is_run(folder: Path) -> None:
    """Check that ``folder`` is that of a run, or is not there yet or empty, as before a run.

    Raises:
        UserError: it is a file, or holds something else.
    """
    with disk_errors(folder, "read"):
        if folder.exists() and not folder.is_dir():
            raise UserError(folder, "is no folder", "give a run folder (logging.folder of its config)")
        if not folder.is_dir() or any((folder / sign).exists() for sign in SIGNS):
            return
        names = sorted(path.name for path in folder.iterdir())
    if any(not name.startswith((".", "run-")) for name in names):
        problem = f"holds no run: none of {', '.join(SIGNS)} is there"
        runs = [name for name in names if any((folder / name / sign).exists() for sign in SIGNS[:3])]
        remedy = f"did you mean {folder / runs[0]}?" if runs else "give a run folder (logging.folder of its config)"
        raise UserError(folder, problem, remedy)


class WatchedRun:
    """What a run folder tells.

    Args:
        folder: the run folder; it may not be there yet.
        name: of the run for readers.
        silent_after: seconds without a record after which a living run counts as silent; None takes a minute, and
            more for a run whose records are further apart.

    Attributes:
        history: of the metrics.
        events: of ``events.jsonl``, the newest ones and every start.
        state: what the run does.
    """

    def __init__(self, folder: Path, name: str, silent_after: float | None = None):
        self.folder, self.name = folder, name
        self.history = RunHistory()
        self.events: list[dict[str, Any]] = []
        self.state = RunState("waiting")
        self._silent_after = silent_after
        self._metrics, self._events = GrowingFile(folder / METRICS_FILE), GrowingFile(folder / EVENTS_FILE)
        self._config_steps: int | None = None
        self._config_time: float | None = None

    def read(self) -> bool:
        """Read what is new; return whether there is more to read at once.

        Raises:
            UserError: the system refuses to read a file.
        """
        new = self._metrics.read()
        if new.anew:
            self.history = RunHistory()
        self.history.take(new.records)
        self.history.damaged += new.damaged
        events = self._events.read()
        self.events = [] if events.anew else self.events
        self.events += events.records
        if len(self.events) > 2 * _MOST_EVENTS:
            old, kept = self.events[:-_MOST_EVENTS], self.events[-_MOST_EVENTS:]
            self.events = [event for event in old if event["kind"] == START] + kept
        if self.start is None:
            self._read_config()
        written = newest([self._metrics.written, self._events.written])
        last = self.events[-1] if self.events else None
        self.state = state_of(self.folder, last, written, self.silent_after, self._is_complete())
        return self._metrics.has_more or self._events.has_more

    @property
    def start(self) -> dict[str, Any] | None:
        """The newest start of the run; None of a run of an earlier version."""
        return next((event for event in reversed(self.events) if event["kind"] == START), None)

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts of the run, the first one first."""
        return [event for event in self.events if event["kind"] == START]

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the whole run; None where nothing tells them."""
        found = self.start.get("steps") if self.start is not None else self._config_steps
        return found if type(found) is int and found > 0 else None

    @property
    def step(self) -> int:
        """The newest step that is known of the run."""
        return max([self.history.step, *(event["step"] for event in self.events[-1:])])

    @property
    def routed_layers(self) -> list[int] | None:
        """Indices of the layers that route; None where nothing tells them."""
        found = self.start.get("routed_layers") if self.start is not None else None
        return found if isinstance(found, list) and all(type(layer) is int for layer in found) else None

    @property
    def happenings(self) -> list[Happening]:
        """What happened to the run, oldest first."""
        return happenings_of(self.events, self.history.marks)

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds that a step has taken lately, with evaluations and saves; None where it is not known."""
        elapsed = self.history.curve(TRAIN, "elapsed_seconds")
        steps, seconds = elapsed.steps[-_RECENT:], elapsed.values[-_RECENT:]
        if len(steps) > 1 and steps[-1] > steps[0] and seconds[-1] > seconds[0]:
            return (seconds[-1] - seconds[0]) / (steps[-1] - steps[0])
        return self.history.latest("step_seconds")

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last step at the present rate; None where it is not known."""
        rate = self.seconds_per_step
        return None if rate is None or self.steps is None else rate * max(0, self.steps - self.history.step)

    @property
    def silent_after(self) -> float:
        """Seconds without a record after which the run counts as silent."""
        if self._silent_after is not None:
            return self._silent_after
        steps = self.history.losses.steps[-_RECENT:]
        gaps = [after - before for before, after in pairwise(steps)]
        rate = self.seconds_per_step
        return max(_SILENT_S, 5 * statistics.median(gaps) * rate if gaps and rate is not None else 0.0)

    def mean_of_routed(self, name: str) -> float | None:
        """Return the mean over the routed layers of a value of each layer, of the newest record."""
        rows = self.history.layers.get(name)
        if rows is None or not rows.rows:
            return None
        row = rows.rows[-1]
        layers = range(len(row)) if self.routed_layers is None else self.routed_layers
        known = [row[layer] for layer in layers if 0 <= layer < len(row) and row[layer] is not None]
        return statistics.fmean(value for value in known if value is not None) if known else None

    def _is_complete(self) -> bool:
        return (self.folder / RESULT_FILE).exists() or (self.steps is not None and self.history.step >= self.steps)

    def _read_config(self) -> None:
        """Read the steps of a run without events out of its config, as often as that changes."""
        path = self.folder / CONFIG_FILE
        try:
            time = path.stat().st_mtime
            if time == self._config_time:
                return
            self._config_time = time
            found = yaml.safe_load(read_regular(path))["training"]["steps"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
            return
        self._config_steps = found if type(found) is int else None
