"""What a run of preprocessing has done so far, so that a killed one goes on with the first file that is missing.

``PREFIX.journal`` is a line of JSON for the options that decide the output, then one line for each checkpoint. A line
is written after the data it tells of is on the disk; a last line cut short by a kill or a power cut does not count.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megachiar.data.inputs.documents import InvalidDocument, InvalidDocumentLog
from megachiar.data.inputs.source import Source
from megachiar.data.storage.writer import BuilderState, open_locked
from megachiar.errors import UserError, disk_errors

Stage = Literal["encoding", "shuffling", "placing"]

JOURNAL_VERSION = 1
SECONDS_BETWEEN_CHECKPOINTS = 0.25
LARGEST_SHARE = 0.02  # of the time that checkpoints may take


@dataclass
class OutputState:
    """How far one output had come: its builder, the text behind its tokens, and how many of them are unknown.

    ``unknown_tokens`` is None in a journal of a version that did not count them.
    """

    builder: BuilderState
    text_bytes: int = 0
    words: int = 0
    unknown_tokens: int | None = 0


@dataclass
class Journal:
    """The journal of a run, locked while it is open.

    Attributes:
        path: its file.
        stage: ``encoding`` files, ``shuffling`` what was encoded, or ``placing`` complete files.
        sources: [name, size, time of change] of each input that is done, in order.
        outputs: how far each output had come then; empty before the first checkpoint.
        log: the documents left out until then.
    """

    path: Path
    stage: Stage = "encoding"
    sources: list[list[Any]] = field(default_factory=list)
    outputs: list[OutputState] = field(default_factory=list)
    log: InvalidDocumentLog = field(default_factory=InvalidDocumentLog)

    @classmethod
    def open(cls, path: Path, options: dict[str, Any], *, restart: bool = False) -> Journal:
        """Open the journal at ``path``, or begin one.

        Args:
            options: what decides the output.
            restart: forget what an earlier run did.

        Raises:
            UserError: it belongs to a run with other options, or another process has it open.
        """
        journal = cls(path)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            journal._file = open_locked(path)
        header = {"journal": JOURNAL_VERSION, **options}
        lines = [] if restart else journal._read()
        try:
            if lines:
                _check_options(path, lines[0], header)
            for line in lines[1:]:
                journal._apply(line)
        except BaseException:
            journal.close()
            raise
        journal._last_checkpoint = time.monotonic()
        journal._cost = 0.0
        if not lines:
            with disk_errors(path):
                journal._file.truncate(0)
                journal._file.seek(0)
            journal._append(header)
        return journal

    def check_sources(self, sources: list[Source]) -> None:
        """Check that the inputs that are done are the first of ``sources``, unchanged.

        Raises:
            UserError: one is missing or was changed since.
        """
        for number, recorded in enumerate(self.sources):
            found = sources[number].identity() if number < len(sources) else None
            if found != recorded:
                what = f"input {number + 1} is {found[0] if found else 'missing'}"
                if found and found[0] == recorded[0]:
                    what = f"input {recorded[0]} was changed since"
                raise UserError(
                    self.path,
                    f"tells of an unfinished run that has read {recorded[0]} as input {number + 1}, but {what}",
                    "name the inputs in the same order, or pass --restart to begin again",
                )

    def due(self) -> bool:
        """Whether it is time for a checkpoint: often, but at a small share of the time."""
        pause = max(SECONDS_BETWEEN_CHECKPOINTS, self._cost / LARGEST_SHARE)
        return time.monotonic() - self._last_checkpoint >= pause

    def checkpoint(
        self, sources: list[list[Any]], outputs: list[OutputState], log: InvalidDocumentLog, stage: Stage = "encoding"
    ) -> None:
        """Record that ``sources`` are done too, and what there is now.

        Raises:
            UserError: the disk is full.
        """
        began = time.monotonic()
        known = [len(output.builder.blocks) for output in self.outputs] or [0] * len(outputs)
        line = {
            "stage": stage,
            "sources": sources,
            "outputs": [
                {
                    **output.builder._asdict(),
                    "blocks": output.builder.blocks[first:],
                    "text_bytes": output.text_bytes,
                    "words": output.words,
                    "unknown_tokens": output.unknown_tokens,
                }
                for output, first in zip(outputs, known, strict=True)
            ],
            "skipped": dict(log.counts),
            "examples": log.examples,
        }
        self._append(line)
        self._apply(json.loads(json.dumps(line)))
        self._last_checkpoint = time.monotonic()
        self._cost = self._last_checkpoint - began

    def remove(self) -> None:
        """The run is done, or nothing of it is worth keeping."""
        try:
            with disk_errors(self.path):
                self.path.unlink(missing_ok=True)
        finally:
            self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closing writes what is still buffered, and a full disk refuses that too
            self._file.close()

    def _read(self) -> list[dict[str, Any]]:
        """The whole lines; what follows the last one is cut off."""
        with disk_errors(self.path, "read"):
            content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            self.close()
            raise UserError(self.path, f"not a journal: {error}", "remove it, or pass --restart") from None
        with disk_errors(self.path):
            self._file.truncate(len(whole))
            self._file.seek(len(whole))
        return lines

    def _append(self, line: dict[str, Any]) -> None:
        with disk_errors(self.path):
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _apply(self, line: dict[str, Any]) -> None:
        self.stage = line["stage"]
        self.sources += line["sources"]
        before = [output.builder.blocks for output in self.outputs] or [[] for _ in line["outputs"]]
        self.outputs = [
            OutputState(
                BuilderState(
                    output["documents"],
                    output["sequences"],
                    output["tokens"],
                    output["largest_token_id"],
                    blocks + output["blocks"],
                ),
                output["text_bytes"],
                output["words"],
                output.get("unknown_tokens"),
            )
            for output, blocks in zip(line["outputs"], before, strict=True)
        ]
        self.log = InvalidDocumentLog(
            "skip", Counter(line["skipped"]), [InvalidDocument(*example) for example in line["examples"]]
        )


def _check_options(path: Path, recorded: dict[str, Any], given: dict[str, Any]) -> None:
    for key in given.keys() | recorded.keys():
        if recorded.get(key) != given.get(key):
            raise UserError(
                path,
                f"tells of an unfinished run with {key} {recorded.get(key)!r}, but this one has {given.get(key)!r}",
                "use the same options to go on, or pass --restart to begin again",
            )
