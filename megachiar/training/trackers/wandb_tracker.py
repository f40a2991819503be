"""Weights & Biases, online or in files of the run folder that ``wandb sync`` sends later."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable

from megachiar.config.trackers import WandbConfig
from megachiar.training.trackers.points import Point
from megachiar.training.trackers.tracker import TrackedRun


class WandbTracker:
    """Sends points to Weights & Biases. Charts have our steps as their axis, since its own may never go back.

    After a resume or a rollback the steps that are taken once more have two points: the service keeps the first ones.

    Args:
        config: of the tracker.
        run: that is tracked.
    """

    def __init__(self, config: WandbConfig, run: TrackedRun):
        import wandb

        if config.mode == "online":
            _check_key(wandb.login)
        self._histogram, self._table = wandb.Histogram, wandb.Table
        known = run.ids.get("wandb")
        name = known or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or run.name,
            group=config.group,
            tags=list(config.tags) or None,
            mode=config.mode,
            id=name,
            resume="allow",
            dir=str(run.folder),
            config=run.config,
            settings=wandb.Settings(console="off", silent=True, login_timeout=1.0),
        )
        self._run.define_metric("*", step_metric="step")
        run.ids.keep("wandb", name)

    def log(self, point: Point) -> None:
        """Add each scalar to its chart, each list as a histogram whose bins are the layers, and texts as a table."""
        histograms = {name: self._histogram(np_histogram=found) for name, found in point.histograms().items()}
        texts = {}
        if point.texts:
            rows = [[point.step, name, text] for name, text in point.texts.items()]
            texts["samples"] = self._table(columns=["step", "name", "text"], data=rows)
        self._run.log({"step": point.step, **point.scalars, **histograms, **texts})

    def rewind(self, step: int) -> None:
        """Do nothing: the service forgets no points."""

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _check_key(login: Callable[..., bool]) -> None:
    """Check that there is a key, without asking at the terminal: a run has nobody who answers.

    Versions of wandb that cannot be told so ask for a second, see ``login_timeout``.

    Raises:
        RuntimeError: there is none.
    """
    if "prompt" in inspect.signature(login).parameters and not login(prompt=False):
        raise RuntimeError("there is no API key: run `wandb login`, or set logging.wandb.mode to offline")
