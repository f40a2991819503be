"""The trackers of a run, as its config names them; rank 0 alone has any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megachiar.config import RunConfig
from megachiar.training.trackers.points import AXES, Naming, Point, point_of_samples
from megachiar.training.trackers.run_ids import RunIds
from megachiar.training.trackers.tracker import TrackedRun, Tracker, check_package
from megachiar.training.trackers.tracker_thread import TrackerThread

PACKAGES = ("wandb", "mlflow", "trackio")
"""Trackers that need a package beside those of every run; keys below ``logging``, extras and modules have its name."""


def check_packages(config: RunConfig) -> None:
    """Check that the package of each tracker that the config names is installed.

    Raises:
        UserError: one is not.
    """
    for name in PACKAGES:
        if getattr(config.logging, name) is not None:
            check_package(name, name)


class RunTrackers:
    """Hands the records of a run to its trackers. It neither raises nor waits until it is closed.

    Args:
        config: of the run.
        step: that the run goes on from.
        records: returns the records of ``metrics.jsonl`` as they are now.
        warn: prints a line of the log.

    Attributes:
        axes: what the run has spent so far, by the names of ``points.AXES``; the trainer keeps it up to date.
    """

    def __init__(
        self,
        config: RunConfig,
        step: int,
        records: Callable[[], Sequence[Mapping[str, Any]]],
        warn: Callable[[str], None],
    ):
        self.axes: dict[str, float | None] = {}
        sets = [*config.data.validation, *(name for name, task in config.mixed.tasks.items() if task.validation)]
        self._naming = Naming(config.model.routed_layers, sets)
        self._records = records
        self._threads = [TrackerThread(name, opened, step, warn) for name, opened in self._openers(config, warn)]

    def log(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Hand a record of ``step`` to every tracker."""
        point = self._naming.point(step, kind, values, self.axes)
        if point.scalars or point.layers:
            for thread in self._threads:
                thread.log(point)

    def log_texts(self, step: int, samples: Sequence[tuple[str, str]]) -> None:
        """Hand prompts and their continuations after ``step`` to every tracker."""
        for thread in self._threads:
            thread.log(point_of_samples(step, samples))

    def rewind(self, step: int) -> None:
        """Let the trackers forget the points of steps after ``step``, as far as they can."""
        for thread in self._threads:
            thread.rewind(step)

    def close(self) -> None:
        """Let the trackers send what is left."""
        for thread in self._threads:
            thread.close()

    def _openers(self, config: RunConfig, warn: Callable[[str], None]) -> list[tuple[str, Callable[[int], Tracker]]]:
        """Return the name of each tracker that the config asks for, and what imports and opens it."""
        logging = config.logging
        openers: list[tuple[str, Callable[[int], Tracker]]] = []
        if logging.tensorboard:
            openers.append(("tensorboard", lambda step: _tensorboard(config, step)))
        if all(getattr(logging, name) is None for name in PACKAGES):
            return openers
        run = TrackedRun(logging.folder, config.flat(), RunIds(logging.folder, warn), self._history)
        if logging.wandb is not None:
            openers.append(("wandb", lambda step: _wandb(config, run)))
        if logging.mlflow is not None:
            openers.append(("mlflow", lambda step: _mlflow(config, run)))
        if logging.trackio is not None:
            openers.append(("trackio", lambda step: _trackio(config, run, step)))
        return openers

    def _history(self, step: int) -> list[Point]:
        """Return the points of all records up to ``step``."""
        records = [record for record in self._records() if record["step"] <= step]
        points = []
        axes: dict[str, float | None] = {}
        for record in records:
            values = {key: value for key, value in record.items() if key not in ("step", "kind")}
            axes |= {name: values[name] for name in AXES if name in values}
            point = self._naming.point(record["step"], record["kind"], values, axes)
            if point.scalars or point.layers:
                points.append(point)
        return points


def _tensorboard(config: RunConfig, step: int) -> Tracker:
    from megachiar.training.trackers.tensorboard_tracker import TensorBoardTracker

    return TensorBoardTracker(config.logging.folder / "tensorboard", step)


def _wandb(config: RunConfig, run: TrackedRun) -> Tracker:
    from megachiar.training.trackers.wandb_tracker import WandbTracker

    assert config.logging.wandb is not None
    return WandbTracker(config.logging.wandb, run)


def _mlflow(config: RunConfig, run: TrackedRun) -> Tracker:
    from megachiar.training.trackers.mlflow_tracker import MlflowTracker

    assert config.logging.mlflow is not None
    return MlflowTracker(config.logging.mlflow, run)


def _trackio(config: RunConfig, run: TrackedRun, step: int) -> Tracker:
    from megachiar.training.trackers.trackio_tracker import TrackioTracker

    assert config.logging.trackio is not None
    return TrackioTracker(config.logging.trackio, run, step)
