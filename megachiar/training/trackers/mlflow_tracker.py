"""MLflow, on a server or in a database of the run folder."""

from __future__ import annotations

import time
from pathlib import Path

from megachiar.config.trackers import MlflowConfig
from megachiar.training.trackers.points import Point
from megachiar.training.trackers.tracker import TrackedRun

_AT_ONCE = 100
"""Parameters that MLflow takes in one call."""
_LONGEST = 500
"""Characters of a parameter that every store of MLflow takes."""


class MlflowTracker:
    """Sends points to MLflow, which has no charts over layers: of lists it gets the mean over routed layers.

    After a resume or a rollback the steps that are taken once more have two points: MLflow forgets none.

    Args:
        config: of the tracker.
        run: that is tracked.
    """

    def __init__(self, config: MlflowConfig, run: TrackedRun):
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=config.tracking_uri or database_of(run.folder))
        known = run.ids.get("mlflow")
        if known is not None and self._goes_on(known):
            self._id = known
            return
        found = self._client.get_experiment_by_name(config.experiment)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(config.experiment)
        self._id = self._client.create_run(experiment, run_name=config.name or run.name).info.run_id
        self._log_config(run)
        run.ids.keep("mlflow", self._id)

    def _goes_on(self, known: str) -> bool:
        """Mark a run as running again; return whether MLflow has it still."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(known, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def _log_config(self, run: TrackedRun) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:_LONGEST]) for key, value in run.config.items()]
        for first in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._id, params=params[first : first + _AT_ONCE])

    def log(self, point: Point) -> None:
        """Add each scalar to its chart, and texts as a file of the run."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, point.step) for name, value in point.scalars.items()]
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)
        if point.texts:
            text = "\n".join(f"# {name}\n\n{text}" for name, text in point.texts.items())
            self._client.log_text(self._id, text, f"samples/step_{point.step:08d}.md")

    def rewind(self, step: int) -> None:
        """Do nothing: MLflow forgets no points."""

    def close(self) -> None:
        """Mark the run as ended; a later start marks it as running again."""
        self._client.set_terminated(self._id)


def database_of(folder: Path) -> str:
    """Return the address of the database in a run folder, whose name may have signs of addresses, such as %."""
    from sqlalchemy import URL

    return URL.create("sqlite", database=f"{folder.resolve()}/mlflow.db").render_as_string()
