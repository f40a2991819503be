"""The page of a run: ``RUN/index.html``. Rank 0 writes it at each evaluation and at the end, and it loads nothing.

A page that cannot be written is a warning of the log, once, and the run goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megachiar.config import RunConfig
from megachiar.data.storage.files import write_atomically
from megachiar.engine.engine import Engine
from megachiar.errors import UserError
from megachiar.monitoring.run_record import record_of_run
from megachiar.monitoring.run_routes import routes_of_engine
from megachiar.monitoring.watched_run import WatchedRun
from megachiar.training.run_data import RunData
from megachiar.viewer.page import as_data, build_page, check_page, parts_of

PAGE_FILE = "index.html"
GENERATOR = b'<meta name="generator" content="megachiar page">'
"""What tells a page of ours from another file."""
KIND = "page of a run"
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'"
NOT_YET = {"note": "the routes of a text are shown from the first evaluation on"}


class RunPage:
    """The page of a run that trains in this process; rank 0 alone has one.

    Args:
        config: of the run.
        warn: prints a line of the log, any text.
    """

    def __init__(self, config: RunConfig, warn: Callable[[str], None]):
        folder = config.logging.folder
        self._run = WatchedRun(folder, folder.resolve().name)
        self._warn = warn
        self._routes: dict[str, Any] = NOT_YET
        self._is_shown, self._has_warned = False, False

    def update(self, engine: Engine, data: RunData) -> None:
        """Write the page with the routes of the model as it is now; it never raises."""
        self._is_shown = True
        self._try(lambda: self._write(routes_of_engine(engine, data)))

    def close(self) -> None:
        """Write the page once more at the end of the run, however it ended; it never raises."""
        if self._is_shown:
            self._try(lambda: self._write(None))

    def _write(self, routes: dict[str, Any] | None) -> None:
        while self._run.read():
            pass
        if routes is not None:
            self._routes = {"step": None, **routes}
            self._routes["step"] = self._routes["step"] if self._routes["step"] is not None else self._run.step
        write_run_page(self._run, self._routes)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # a picture of the run must not end the run
            if not self._has_warned:
                reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                self._warn(f"{self._run.folder / PAGE_FILE} was not written: {reason}. The run goes on")
            self._has_warned = True


def write_run_page(run: WatchedRun, routes: dict[str, Any], path: Path | None = None) -> Path:
    """Write the page of a run as it was read last, whole or not at all, and return its path.

    Args:
        run: that was read.
        routes: as ``run_routes`` returns them.
        path: of the page; None for the run folder's own.

    Raises:
        UserError: another file has the name, or the disk refuses the page.
    """
    path = run.folder / PAGE_FILE if path is None else path
    check_page(path, GENERATOR, KIND)
    write_atomically(path, run_page(record_of_run(run, routes)).encode("utf-8", "replace"))
    return path


def run_page(record: dict[str, Any]) -> str:
    """Return the page of a record."""
    title = f"{record['run']}: step {record['step']:,}"
    return build_page(title, as_data(record, digits=None), POLICY, _parts())


@functools.cache
def _parts() -> dict[str, str]:
    return parts_of("megachiar.monitoring", "run.html", "charts.css", ("charts.js", "run.js"))
