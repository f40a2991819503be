"""Write the corpus of a task: ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl``.

Each line holds an example: ``text``, or ``text1`` and ``text2``, or ready-made ``tokens``; its ``label``; and what else
tells where it is from. ``megachiar preprocess --label-key label`` makes labelled datasets of them. The long-range tasks
have ``answers`` in place of a label, and are read as text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from megachiar.data.preprocessing.corpus_files import PARTS, part_paths, write_parts
from megachiar.data.preprocessing.existing import OutputDiffers, note_path, read_note, write_note
from megachiar.data.preprocessing.split import Split
from megachiar.data.storage.identity import file_identity
from megachiar.errors import UserError, disk_errors
from megachiar.progress import ByteProgress

Example = tuple[str, Mapping[str, Any]]
"""The part of an example, ``train``, ``valid`` or ``test``, and the values of its line."""
VALIDATION = Split.parse("train=9,valid=1")
"""A tenth of the training examples, by the hash of their text, validates where a task brings no validation set."""
COUNTED_TOGETHER = 64  # examples between two looks at the clock


class TaskReport(NamedTuple):
    """Describe the corpus of a task.

    Attributes:
        counts: part -> label, or ``with answers`` -> number of examples.
        existed: whether the corpus existed already, made by the same call, so that nothing was done.
    """

    counts: dict[str, dict[str, int]]
    existed: bool = False

    def lines(self) -> Iterator[str]:
        """Yield a line for each part, with the counts of its labels."""
        for part, labels in self.counts.items():
            shown = ", ".join(f"{label} {count:,}" for label, count in labels.items())
            yield f"{part}.jsonl: {sum(labels.values()):,} examples; {shown}"


class ExampleProgress(ByteProgress):
    """Show how many examples are written."""

    def amount(self) -> str:
        """Return the amount that is done, such as ``1,021 examples``."""
        return f"{self.consumed:,} examples"

    def rates(self) -> str:
        """Return the rate, such as ``1,021 examples/s``."""
        return f"{self.per_second(self.consumed):,.0f} examples/s"


def write_task(
    make_examples: Callable[[], Iterable[Example]],
    folder: Path,
    requested: Mapping[str, Any],
    *,
    inputs: Iterable[Path] = (),
    total: int | None = None,
    overwrite: bool = False,
    stream: TextIO | None = None,
) -> TaskReport:
    """Write the examples of a task into ``folder``, all files or none; do nothing if that was done before.

    Args:
        make_examples: returns the examples; not called if there is nothing to do.
        folder: where the files go.
        requested: the options that the examples depend on, with ``source``, the name of the task.
        inputs: the files that the examples are made of.
        total: how many examples there will be, where that is known.
        overwrite: replace files that hold something else.
        stream: where progress is shown; standard error if None.

    Raises:
        UserError: the examples cannot be made, a part has none, a file holds something else, or the disk is full.
    """
    note, files = note_path(folder / "corpus"), list(part_paths(folder).values())
    state = _digest_of(inputs)

    def compare_inputs(recorded: Any) -> None:
        if recorded != [state]:
            raise OutputDiffers("the files that it was made of were changed since")

    if not overwrite:
        with contextlib.suppress(OutputDiffers):
            return TaskReport(read_note(note, requested, files, compare_inputs), existed=True)
    counts: dict[str, Counter[str]] = {part: Counter() for part in PARTS}
    with ExampleProgress("writing", total, stream) as progress:
        write_parts(_counted(make_examples(), counts, progress), folder, overwrite=overwrite)
    found = {part: {label: labels[label] for label in sorted(labels)} for part, labels in counts.items()}
    write_note(note, {**requested, "inputs": [state]}, files, found)
    return TaskReport(found)


def _counted(
    examples: Iterable[Example], counts: Mapping[str, Counter[str]], progress: ExampleProgress
) -> Iterator[Example]:
    """Yield ``examples`` and count their labels.

    Raises:
        UserError: a part has no example.
    """
    number = 0
    for number, (part, record) in enumerate(examples, 1):
        counts[part][str(record.get("label", "with answers"))] += 1
        if number % COUNTED_TOGETHER == 0:
            progress.advance(COUNTED_TOGETHER)
        yield part, record
    progress.advance(number % COUNTED_TOGETHER)
    for part, labels in counts.items():
        if not labels:
            raise UserError(f"{part}.jsonl", f"got none of {number:,} examples", "give more examples")


def _digest_of(inputs: Iterable[Path]) -> str:
    """Return a digest of names, sizes and times of files: where it is the same, none of them was touched."""
    digest = hashlib.sha256()
    for path in inputs:
        with disk_errors(path, "read"):
            digest.update(json.dumps(file_identity(path)).encode() + b"\n")
    return digest.hexdigest()


def part_of(text: str) -> str:
    """Return the part of an example of a training set that brings no validation set: a tenth is ``valid``."""
    return VALIDATION.names[VALIDATION.part_of(text.encode())]
