"""Leave a folder in the run folder for each step with bad numbers, from which the step can be understood and replayed.

    RUN/incidents/step_00000815/incident.json    numbers, samples with their documents, versions, history of the data,
                                                 checkpoints before it and steps left out since
                                config.yaml      the resolved config
    RUN/incidents/more.json                      how many incidents there were beyond the ``MOST_FOLDERS`` first

``megachiar replay`` repeats such a step. The checkpoint before the newest incident is not removed as long as the
incident's folder is there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape

from megachiar.checkpoint.format import checkpoint_step, fingerprint_of, named_checkpoints
from megachiar.config import RunConfig
from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_json, with_seal
from megachiar.engine.step_metrics import StepResult
from megachiar.errors import UserError, disk_errors
from megachiar.training.bad_steps import BadStep
from megachiar.training.environment import versions
from megachiar.training.incident_record import INCIDENT_FILE, incidents_folder
from megachiar.training.json_lines import without_nan
from megachiar.training.run_data import RunData
from megachiar.training.schedule import learning_rate

MOST_FOLDERS = 20
CONFIG_FILE, MORE_FILE = "config.yaml", "more.json"


class Incidents:
    """Write the incidents of a run; rank 0 alone does so.

    Args:
        config: of the run.
        layout: of the run, as text for people.
        log: prints a line of the log.
    """

    def __init__(self, config: RunConfig, layout: str, log: Callable[[str], None]):
        self._config = config
        self._layout = layout
        self._log = log
        self._folder = incidents_folder(config.logging.folder)

    def record(
        self,
        step: int,
        bad: BadStep,
        result: StepResult,
        data: RunData,
        newest: Path | None,
        skipped: Sequence[int] = (),
    ) -> None:
        """Write the incident of ``step``; a disk that refuses is a line of the log, and the run goes on.

        Args:
            step: number of the step.
            bad: what was bad, and what follows.
            result: of the step.
            data: that the step has read.
            newest: the newest checkpoint before the step; None before the first.
            skipped: the steps that were left out since the run started or went back.
        """
        try:
            with disk_errors(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                if len(list(self._folder.glob("step_*"))) >= MOST_FOLDERS:
                    self._count_more()
                    return
                path = self._new_folder(step)
                incident = {**self._describe(step, bad, result, data), **_describe_way(newest, skipped, step)}
                text = json.dumps(with_seal(without_nan(incident)), indent=1)
                write_atomically(path / CONFIG_FILE, self._config.to_yaml().encode())
                write_atomically(path / INCIDENT_FILE, (text + "\n").encode())
        except UserError as error:
            self._log(f"[yellow]  the incident of step {step} was not recorded: {escape(str(error))}[/]")

    def _describe(self, step: int, bad: BadStep, result: StepResult, data: RunData) -> dict[str, Any]:
        positions = data.history.samples_of(step)
        return {
            "step": step,
            "kind": bad.kind,
            "reason": bad.reason,
            "action": bad.action,
            "learning_rate": learning_rate(self._config, step),
            "result": asdict(result),
            "samples": [
                {
                    "sample": position,
                    "source": str(data.training.sources[location.source].prefix),
                    "epoch": location.epoch,
                    "first_token": location.token,
                    "documents": data.training.documents(position),
                }
                for position, location in zip(positions, data.training.locate(positions), strict=True)
            ],
            "versions": versions(),
            "layout": self._layout,
            "data": data.history.model_dump(mode="json"),
        }

    def _new_folder(self, step: int) -> Path:
        """Make the folder of an incident of ``step``; after a rollback a step may have several."""
        name, number = f"step_{step:08d}", 1
        while (path := self._folder / (name if number == 1 else f"{name}_{number}")).exists():
            number += 1
        path.mkdir()
        return path

    def _count_more(self) -> None:
        path = self._folder / MORE_FILE
        write_atomically(path, (json.dumps({"incidents": _count_in(path) + 1}) + "\n").encode())


def _describe_way(newest: Path | None, skipped: Sequence[int], step: int) -> dict[str, Any]:
    """Return what a replay needs to come to a step: checkpoints, and the steps left out since the newest of them.

    A later run may set checkpoints aside and save others of the same names; the fingerprint tells them apart.
    """
    last = (checkpoint_step(newest) or 0) if newest is not None else 0
    fingerprints = {}
    for path in named_checkpoints(newest.parent) if newest is not None else []:
        if (checkpoint_step(path) or 0) <= last:
            with contextlib.suppress(UserError):  # it is damaged, and no replay starts from it
                fingerprints[path.name] = fingerprint_of(path)
    return {
        "checkpoint": newest and str(newest),
        "fingerprints": fingerprints,
        "skipped_steps": [number for number in skipped if last < number < step],
    }


def _count_in(path: Path) -> int:
    """Return the number in ``more.json``; 0 where there is none that can be read."""
    try:
        count = parse_json(read_regular(path))["incidents"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return count if type(count) is int else 0
