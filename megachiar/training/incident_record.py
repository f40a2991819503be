"""Find the incidents of a run folder, and the checkpoint that a replay starts from."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_sealed

INCIDENT_FILE = "incident.json"


def incidents_folder(run: Path) -> Path:
    """Return the folder of a run's incidents."""
    return run / "incidents"


def newest_incident(run: Path) -> Path | None:
    """Return the folder of the incident that a run recorded last; None without one."""
    times = {}
    for path in incidents_folder(run).glob("step_*"):
        with contextlib.suppress(OSError):  # it is being removed, or not whole yet
            times[path] = (path / INCIDENT_FILE).stat().st_mtime_ns
    return max(times, key=lambda path: (times[path], path.name), default=None)


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
