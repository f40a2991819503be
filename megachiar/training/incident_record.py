"""Read the incidents of a run folder, and find the checkpoint that a replay starts from."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megachiar.checkpoint.format import checkpoint_step
from megachiar.data.sampling.history import DataHistory
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_sealed
from megachiar.errors import UserError, disk_errors

INCIDENT_FILE = "incident.json"
_NAME = re.compile(r"step_(\d{8,18})(?:_(\d{1,9}))?")


class IncidentRecord(BaseModel):
    """What a replay takes from ``incident.json``.

    Attributes:
        step: number of the step; 0 in a record that does not tell it.
        checkpoint: path of the checkpoint before the step; None if there was none.
        fingerprints: ``fingerprint_of`` each checkpoint that the run had then, by name; None in records of earlier
            versions.
        skipped_steps: the steps after that checkpoint that were left out.
        learning_rate: of the step; None in records that do not tell it.
        result: numbers of the step by name; None stands for one that is not finite.
        action: what followed.
        data: history of the data that the step has read.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    step: int = 0
    checkpoint: str | None = None
    fingerprints: dict[str, str] | None = None
    skipped_steps: tuple[int, ...] = ()
    learning_rate: float | None = None
    result: dict[str, Any] = {}
    action: str = ""
    data: DataHistory

    @property
    def checkpoint_step(self) -> int:
        """The step of the checkpoint before the incident; 0 if there was none."""
        return (checkpoint_step(Path(self.checkpoint)) or 0) if self.checkpoint is not None else 0


def incidents_folder(run: Path) -> Path:
    """Return the folder of a run's incidents."""
    return run / "incidents"


def find_incidents(run: Path) -> list[Path]:
    """Return the folders of a run's incidents by their step, those of one step oldest first."""
    return list(_steps_of_incidents(run))


def find_incident(run: Path, step: int) -> Path | None:
    """Return the newest incident of ``step``; None if the run recorded none."""
    return next((path for path, number in reversed(_steps_of_incidents(run).items()) if number == step), None)


def _steps_of_incidents(run: Path) -> dict[Path, int]:
    found = {
        path: (int(match[1]), int(match[2] or 1))
        for path in incidents_folder(run).glob("step_*")
        if (match := _NAME.fullmatch(path.name)) and (path / INCIDENT_FILE).exists()
    }
    return {path: found[path][0] for path in sorted(found, key=found.__getitem__)}


def newest_incident(run: Path) -> Path | None:
    """Return the folder of the incident that a run recorded last; None without one."""
    times = {}
    for path in incidents_folder(run).glob("step_*"):
        with contextlib.suppress(OSError):  # it is being removed, or not whole yet
            times[path] = (path / INCIDENT_FILE).stat().st_mtime_ns
    return max(times, key=lambda path: (times[path], path.name), default=None)


def read_incident(incident: Path) -> IncidentRecord:
    """Return the record of an incident.

    Raises:
        UserError: the record cannot be read, or was altered.
    """
    path = incident / INCIDENT_FILE
    with disk_errors(path, "read"):
        content = read_regular(path)
    try:
        return IncidentRecord.model_validate_json(json.dumps(parse_sealed(content)))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
    except (ValueError, TypeError) as error:
        problem = str(error)
    raise UserError(path, f"is no record of an incident: {problem}", "move its folder away to replay without it")


def checkpoint_of(incident: Path) -> str | None:
    """Return the name of the checkpoint before an incident; None if it came before the first, or tells none."""
    try:
        checkpoint = parse_sealed(read_regular(incident / INCIDENT_FILE))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Path(checkpoint).name if isinstance(checkpoint, str) else None


def checkpoint_to_spare(run: Path) -> str | None:
    """Return the name of the checkpoint that a replay of the newest incident starts from; None if there is none."""
    incident = newest_incident(run)
    return checkpoint_of(incident) if incident is not None else None
