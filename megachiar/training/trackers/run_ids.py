"""The names under which trackers know a run, kept over a resume: ``RUN/trackers.json``, sealed.

{"wandb": "3f9c01d2", "mlflow": "...", "trackio": "...", "seal": "..."}
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from megachiar.data.storage.files import write_atomically
from megachiar.data.storage.regular_file import read_regular
from megachiar.data.storage.sealed_json import parse_sealed, pretty_sealed
from megachiar.errors import UserError

FILE = "trackers.json"


class RunIds:
    """Reads and keeps the names; threads may share it.

    A file that is damaged or cannot be read is said once, and the run begins anew in each tracker.

    Args:
        folder: the run folder.
        warn: prints a line of the log.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        self._path = folder / FILE
        self._warn = warn
        self._lock = threading.Lock()
        self._ids = self._read()

    def get(self, tracker: str) -> str | None:
        """Return the name under which ``tracker`` knows this run; None if it does not know it yet."""
        return self._ids.get(tracker)

    def keep(self, tracker: str, name: str) -> None:
        """Keep the name under which ``tracker`` knows this run."""
        with self._lock:
            if self._ids.get(tracker) == name:
                return
            self._ids[tracker] = name
            try:
                write_atomically(self._path, pretty_sealed(self._ids))
            except UserError as error:
                self._warn(f"{self._path} cannot be written: a later start is another run to {tracker}: {error}")

    def _read(self) -> dict[str, str]:
        try:
            record = parse_sealed(read_regular(self._path))
            if not (isinstance(record, dict) and all(isinstance(name, str) for name in record.values())):
                raise ValueError("it is no record of names")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"{self._path} cannot be used: {error}. To trackers this start is another run")
            return {}
        return record
