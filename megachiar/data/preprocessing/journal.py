"""Record the progress of a run of preprocessing, so that a killed run continues with the first missing file.

``PREFIX.journal`` is a line of JSON for the options that determine the output, then one line for each checkpoint. A
line is written after the data it describes is on the disk. A last line that a kill or a power cut shortened is ignored.
Each line has a seal, which covers the seal of the line before: a digit that changed, and a line that is gone, would
else give another dataset. A journal that an earlier version began has no seals.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from megachiar.data.inputs.documents import InvalidDocument, InvalidDocumentLog, ReadOptions
from megachiar.data.inputs.source import Source
from megachiar.data.preprocessing.source_records import find_changed
from megachiar.data.storage.label_writer import LabelsState
from megachiar.data.storage.sealed_json import SEAL, parse_json, with_seal, without_seal
from megachiar.data.storage.writer import BuilderState, open_locked
from megachiar.errors import UserError, disk_errors

Stage = Literal["encoding", "shuffling", "placing"]

JOURNAL_VERSION = 1
SECONDS_BETWEEN_CHECKPOINTS = 0.25
LARGEST_SHARE = 0.02  # the share of the time that checkpoints may take


@dataclass
class OutputState:
    """Record how far one output has come.

    Attributes:
        builder: the state of its builder.
        text_bytes: the UTF-8 bytes of the text so far.
        words: the words of the text so far.
        unknown_tokens: the number of unknown tokens so far, for text that the vocabulary lacks; None in the journal of
            an earlier version, which did not count them.
        labels: the state of its labels; None without labels.
    """

    builder: BuilderState
    text_bytes: int = 0
    words: int = 0
    unknown_tokens: int | None = 0
    labels: LabelsState | None = None

    def as_dict(self, known_blocks: int) -> dict[str, Any]:
        """Return the values for a line of the journal, without the first ``known_blocks`` blocks of ``.bin``."""
        values = {
            **self.builder._asdict(),
            "blocks": self.builder.blocks[known_blocks:],
            "text_bytes": self.text_bytes,
            "words": self.words,
            "unknown_tokens": self.unknown_tokens,
        }
        return values if self.labels is None else {**values, "labels": self.labels}


@dataclass
class Journal:
    """Keep the journal of a run, locked while it is open.

    Attributes:
        path: the journal's file.
        file: the same, open and locked.
        stage: ``encoding`` inputs, ``shuffling`` encoded documents, or ``placing`` complete files.
        sources: the record of each input that is done, in order, see ``source_records``.
        outputs: how far each output had come at the last checkpoint; empty before the first one.
        log: the documents that were left out until then.
        classes: the classes that were found until then, in order.
    """

    path: Path
    file: BinaryIO
    stage: Stage = "encoding"
    sources: list[list[Any]] = field(default_factory=list)
    outputs: list[OutputState] = field(default_factory=list)
    log: InvalidDocumentLog = field(default_factory=InvalidDocumentLog)
    classes: list[str] = field(default_factory=list)
    _last_checkpoint: float = field(default_factory=time.monotonic)
    _cost: float = 0.0  # seconds that the last checkpoint took
    _seal: str | None = None  # of the last line; None in a journal without seals

    @classmethod
    def open(cls, path: Path, options: dict[str, Any], *, restart: bool = False) -> Journal:
        """Open the journal at ``path``, or begin a new one.

        Args:
            path: the journal's file.
            options: the options that determine the output.
            restart: whether to drop the progress of an earlier run.

        Raises:
            UserError: it belongs to a run with other options, or another process has it open.
        """
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            journal = cls(path, open_locked(path))
        header = {"journal": JOURNAL_VERSION, **options}
        try:
            lines = [] if restart else journal._read()
            if lines:
                _check_options(path, lines[0], header)
            journal._apply_all(lines[1:])
        except BaseException:
            journal.close()
            raise
        if not lines:
            with disk_errors(path):
                journal.file.truncate(0)
                journal.file.seek(0)
            journal._seal = ""
            journal._append(header)
        return journal

    def check_sources(self, sources: list[Source], read: ReadOptions, stream: TextIO | None = None) -> None:
        """Check that the inputs that are done are the first of ``sources``, and were not changed.

        Args:
            sources: the inputs as they are now.
            read: how the inputs were read.
            stream: where progress is shown while inputs are compared; standard error if None.

        Raises:
            UserError: one is missing or was changed since.
        """
        for number, recorded in enumerate(self.sources):
            found = sources[number].name if number < len(sources) else "missing"
            if found != recorded[0]:
                raise self._other_input(number, f"input {number + 1} is {found}")
        changed = find_changed(sources[: len(self.sources)], self.sources, read, stream)
        if changed is not None:
            raise self._other_input(sources.index(changed), f"input {changed.name} was changed since")

    def _other_input(self, number: int, problem: str) -> UserError:
        """Return the error for an input that is not the one that was read."""
        return UserError(
            self.path,
            f"tells of an unfinished run that has read {self.sources[number][0]} as input {number + 1}, but {problem}",
            "name the inputs in the same order, or pass --restart to begin again",
        )

    def due(self) -> bool:
        """Return whether it is time for a checkpoint: often, but at a small share of the time of the run."""
        pause = max(SECONDS_BETWEEN_CHECKPOINTS, self._cost / LARGEST_SHARE)
        return time.monotonic() - self._last_checkpoint >= pause

    def checkpoint(
        self,
        sources: list[list[Any]],
        outputs: list[OutputState],
        log: InvalidDocumentLog,
        stage: Stage = "encoding",
        classes: Sequence[str] = (),
    ) -> None:
        """Record that ``sources`` are done too, and how far the outputs have come.

        Args:
            sources: the record of each input that was done since the last checkpoint.
            outputs: how far each output has come; all of it is on the disk.
            log: the documents left out so far.
            stage: the next one of the run.
            classes: all that were found so far, in order.

        Raises:
            UserError: the disk is full.
        """
        began = time.monotonic()
        known = [len(output.builder.blocks) for output in self.outputs] or [0] * len(outputs)
        line: dict[str, Any] = {
            "stage": stage,
            "sources": sources,
            "outputs": [output.as_dict(first) for output, first in zip(outputs, known, strict=True)],
            "skipped": dict(log.counts),
            "examples": log.examples,
            **({"replaced": log.replaced} if log.replaced else {}),
        }
        if new := classes[len(self.classes) :]:
            line["classes"] = list(new)
        self._append(line)
        self._apply(json.loads(json.dumps(line)))
        self._last_checkpoint = time.monotonic()
        self._cost = self._last_checkpoint - began

    def remove(self) -> None:
        """Remove the journal of a run that is done, or whose progress is not worth keeping."""
        try:
            with disk_errors(self.path):
                self.path.unlink(missing_ok=True)
        finally:
            self.close()

    def close(self) -> None:
        """Close the file, which stays for the next run."""
        with contextlib.suppress(OSError):  # closing writes buffered bytes, and a full disk refuses that too
            self.file.close()

    def _read(self) -> list[dict[str, Any]]:
        """Return the complete lines without their seals, and cut off the rest of the file.

        Raises:
            UserError: a line is no JSON object, or was altered, or one before it is gone.
        """
        with disk_errors(self.path, "read"):
            content = self.file.read()
        whole = content[: content.rfind(b"\n") + 1]
        lines: list[dict[str, Any]] = []
        for number, text in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                line = parse_json(text)
                if not isinstance(line, dict):
                    raise ValueError("it is no JSON object")
                if number > 1 and (SEAL in line) != (self._seal is not None):
                    raise ValueError("it has no seal" if self._seal else "it has a seal, but the first line has none")
                lines.append(without_seal(line, self._seal or ""))
            except ValueError as error:
                raise self._damaged(number, str(error)) from None
            self._seal = line.get(SEAL)
        with disk_errors(self.path):
            self.file.truncate(len(whole))
            self.file.seek(len(whole))
        return lines

    def _append(self, line: dict[str, Any]) -> None:
        """Write a line, and make it survive a power cut."""
        with disk_errors(self.path):
            if self._seal is not None:
                line = with_seal(line, self._seal)
                self._seal = line[SEAL]
            self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def _apply_all(self, lines: list[dict[str, Any]]) -> None:
        """Take over the records of lines that were read.

        Raises:
            UserError: a line is no record of a checkpoint.
        """
        for number, line in enumerate(lines, 2):
            try:
                self._apply(line)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise self._damaged(number, f"it is no record of a checkpoint: {error!r}") from None

    def _damaged(self, line: int, problem: str) -> UserError:
        where, remedy = f"{self.path}:{line}", "pass --restart to begin again"
        return UserError(where, f"is not a line of a journal: {problem}", remedy)

    def _apply(self, line: dict[str, Any]) -> None:
        """Take over the record of a checkpoint's line."""
        self.stage = line["stage"]
        self.sources += line["sources"]
        before = [output.builder.blocks for output in self.outputs] or [[] for _ in line["outputs"]]
        self.outputs = [
            OutputState(
                BuilderState(
                    documents=output["documents"],
                    sequences=output["sequences"],
                    tokens=output["tokens"],
                    largest_token_id=output["largest_token_id"],
                    blocks=blocks + output["blocks"],
                    unfinished_block=output.get("unfinished_block"),
                    lengths_checksum=output.get("lengths_checksum"),
                    starts_checksum=output.get("starts_checksum"),
                ),
                output["text_bytes"],
                output["words"],
                output.get("unknown_tokens"),
                LabelsState(*output["labels"]) if "labels" in output else None,
            )
            for output, blocks in zip(line["outputs"], before, strict=True)
        ]
        self.classes += line.get("classes", [])
        self.log = InvalidDocumentLog(
            "skip",
            Counter(line["skipped"]),
            [InvalidDocument(*example) for example in line["examples"]],
            line.get("replaced", 0),
        )


def _check_options(path: Path, recorded: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse to continue a run with other options."""
    for key in given.keys() | recorded.keys():
        if recorded.get(key) != given.get(key):
            raise UserError(
                path,
                f"tells of an unfinished run with {key} {recorded.get(key)!r}, but this one has {given.get(key)!r}",
                "use the same options to go on, or pass --restart to begin again",
            )
