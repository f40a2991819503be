"""trackio, which keeps its runs in a database of this machine."""

from __future__ import annotations

import uuid

from megachiar.config.trackers import TrackioConfig
from megachiar.training.trackers.points import Point
from megachiar.training.trackers.tracker import TrackedRun


class TrackioTracker:
    """Keeps points in trackio. A run that goes on from an earlier step is filled anew from ``metrics.jsonl``.

    Args:
        config: of the tracker.
        run: that is tracked.
        step: that the run goes on from.
    """

    def __init__(self, config: TrackioConfig, run: TrackedRun, step: int):
        import trackio

        self._trackio, self._config, self._tracked = trackio, config, run
        known = run.ids.get("trackio")
        # trackio knows runs by their names: a part of its own keeps those of two folders apart.
        self._name = known or f"{config.name or run.name}-{uuid.uuid4().hex[:6]}"
        self._begin(step if known is not None else None)
        run.ids.keep("trackio", self._name)

    def _begin(self, step: int | None) -> None:
        """Open the run in trackio; one that exists is filled anew with the points up to ``step``."""
        if step is not None:
            for run in self._trackio.Api().runs(self._config.project):
                if run.name == self._name:
                    run.delete()
        self._run = self._trackio.init(
            project=self._config.project,
            name=self._name,
            config=self._tracked.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        if step is not None:
            for point in self._tracked.history(step):
                self.log(point)

    def log(self, point: Point) -> None:
        """Add each scalar to its chart, each list as a histogram whose bins are the layers, and each text."""
        kind = self._trackio.Histogram
        texts = {name: self._trackio.Markdown(text) for name, text in point.texts.items()}
        histograms = {name: kind(np_histogram=found) for name, found in point.histograms().items()}
        self._run.log({**point.scalars, **histograms, **texts}, step=point.step)

    def rewind(self, step: int) -> None:
        """Fill the run anew with the points up to ``step``."""
        self._run.finish()
        self._begin(step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()
