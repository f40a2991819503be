"""The one interface of all trackers, and what each of them is told of the run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from megachiar.errors import UserError
from megachiar.training.trackers.points import Point
from megachiar.training.trackers.run_ids import RunIds


class Tracker(Protocol):
    """Shows a run's points in charts. Every method may raise anything; ``TrackerThread`` says it and goes on."""

    def log(self, point: Point) -> None:
        """Add a point."""
        ...

    def rewind(self, step: int) -> None:
        """Forget the points of steps after ``step``, from which the run goes on once more, if the tracker can."""
        ...

    def close(self) -> None:
        """Send what is left, and end."""
        ...


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of the run.

    Attributes:
        folder: the run folder.
        config: every key of the config by its dotted name.
        ids: the names under which trackers know this run, kept in the run folder.
        history: returns the points of the run up to a step, oldest first, for a tracker that has to be filled anew.
    """

    folder: Path
    config: dict[str, Any]
    ids: RunIds
    history: Callable[[int], Sequence[Point]] = field(default=lambda step: ())

    @property
    def name(self) -> str:
        """Return the name of the run for people."""
        return self.folder.resolve().name


def check_package(name: str, module: str) -> None:
    """Check that the package of a tracker is installed, without importing it.

    Args:
        name: of the tracker, as its key below ``logging`` and its extra have it.
        module: that it is imported as.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"logging.{name}",
            f"is set, but the package {module} is not installed",
            f"pip install 'megachiar[{name}]', or set logging.{name} to null",
        )
