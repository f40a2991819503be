"""What a run writes when it is asked to continue texts: ``samples.jsonl`` of the run folder, one sample a line.

    {"step": 500, "prompt": "Once upon", "text": " a time there was"}

``text`` is the continuation alone. The file exists once a sample was written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megachiar.training.json_lines import JsonLines, read_lines

FILE = "samples.jsonl"


class Sample(NamedTuple):
    """A text that the run has continued.

    Attributes:
        prompt: the text.
        text: the continuation, without the prompt.
    """

    prompt: str
    text: str


class SamplesFile:
    """Writes samples; rank 0 alone does so.

    Args:
        folder: the run folder.
        step: step that the run continues from; samples of later steps are removed.
        warn: prints a line of the log.
    """

    def __init__(self, folder: Path, step: int, warn: Callable[[str], None]):
        self._path, self._warn = folder / FILE, warn
        self._lines = self._opened(step) if self._path.exists() else None

    def write(self, step: int, samples: list[Sample]) -> None:
        """Append the samples of a step."""
        if self._lines is None:
            self._lines = self._opened(step)
        for sample in samples:
            self._lines.write({"step": step, **sample._asdict()})

    def rewind(self, step: int) -> None:
        """Remove the samples of steps after ``step``."""
        if self._lines is not None:
            self._lines.rewind(step)

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def _opened(self, step: int) -> JsonLines:
        return JsonLines(self._path, step, self._warn, _is_sample)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the samples of the run in ``folder``, oldest first; none where it has none.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / FILE
    return read_lines(path, _is_sample)[0] if path.exists() else []


def _is_sample(record: dict[str, Any]) -> bool:
    return isinstance(record.get("prompt"), str) and isinstance(record.get("text"), str)
