"""Read a dataset whose answers are known: ``PREFIX.bin`` beside ``PREFIX.jsonl``, the lines that it was made of.

A line of a long-range task has ``tokens``, the ids of its document, and ``answers`` [[position, distance], ...]. So
nothing else is written beside the dataset. Each line is compared with its document.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megachiar.data.sampling.dataset import TokenSource
from megachiar.data.storage.regular_file import check_regular
from megachiar.data.tasks.long_range import Answer
from megachiar.errors import UserError, disk_errors

MAKE_AGAIN = (
    "make both again: `megachiar corpus recall`, then `megachiar preprocess --token-key tokens` without shuffling"
)


class AnsweredSet:
    """Read documents whose answers are known.

    Attributes:
        source: the dataset.
        documents: how many there are.
        answers: of each document, by rising position.

    Args:
        source: the dataset.
        path: the lines that it was made of; ``PREFIX.jsonl`` if None.

    Raises:
        UserError: there are no such lines, a line has no answers or wrong ones, or lines and documents differ.
    """

    def __init__(self, source: TokenSource, path: Path | None = None):
        self.source, self.documents = source, source.dataset.documents
        self.path = path or Path(f"{source.prefix}.jsonl")
        self.answers = [self._answers_of(number, line) for number, line in enumerate(self._lines())]
        if len(self.answers) != self.documents:
            problem = f"has {len(self.answers):,} lines, but {source.prefix} has {self.documents:,} documents"
            raise UserError(self.path, problem, MAKE_AGAIN)

    def tokens(self, number: int) -> NDArray[Any]:
        """Return the tokens of a document up to its last answer, int64 (length,)."""
        start = self.source.dataset.token_of_document(number)
        tokens = np.empty(self.answers[number][-1].position + 1, np.int64)
        self.source.read(start, tokens)
        return tokens

    def check_length(self, longest: int) -> None:
        """Check that a model that reads ``longest`` tokens can give every answer.

        Raises:
            UserError: an answer has more tokens before it.
        """
        for number, answers in enumerate(self.answers):
            answer = answers[-1]
            if answer.position > longest:
                problem = (
                    f"the answer at position {answer.position:,}, at distance {answer.distance:,}, has more tokens "
                    f"before it than model.max_sequence_length {longest:,}"
                )
                remedy = f"make examples with `--length` {longest + 1} or less, or name a run of longer sequences"
                raise UserError(f"{self.path}:{number + 1}", problem, remedy)

    def _lines(self) -> Iterator[bytes]:
        """Yield the lines of the file."""
        try:
            with disk_errors(self.path, "read"):
                check_regular(self.path)
                with open(self.path, "rb") as file:
                    yield from file
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            remedy = (
                "give the file with --answers, make such a dataset with `megachiar corpus recall`, or measure the loss "
                "by position of any text with --by position"
            )
            raise UserError(self.path, "does not exist, so that no answer has a distance", remedy) from None

    def _answers_of(self, number: int, line: bytes) -> list[Answer]:
        """Return the answers of a line, after a look at its document."""
        where = f"{self.path}:{number + 1}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(where, f"is no JSON: {error}", MAKE_AGAIN) from None
        missing = [key for key in ("tokens", "answers") if not isinstance(record, dict) or key not in record]
        if missing:
            remedy = "name the lines of a long-range task, which `megachiar corpus recall` and others write"
            raise UserError(where, f"has no {' and no '.join(missing)}, so that no answer has a distance", remedy)
        dataset = self.source.dataset
        if number >= self.documents or record["tokens"] != dataset.document(number).tolist():
            problem = f"is not document {number:,} of {self.source.prefix}"
            raise UserError(where, problem, MAKE_AGAIN)
        answers = record["answers"]
        if not answers or not _are_answers(answers, len(record["tokens"])):
            problem = "its answers are no list of [position, distance], with positions rising and distances below them"
            raise UserError(where, problem, MAKE_AGAIN)
        return [Answer(*answer) for answer in answers]


def _are_answers(answers: Any, tokens: int) -> bool:
    """Return whether ``answers`` are pairs of whole numbers that a document of ``tokens`` tokens can have."""
    if not isinstance(answers, list):
        return False
    before = 0
    for answer in answers:
        if not isinstance(answer, list) or [type(value) for value in answer] != [int, int]:
            return False
        position, distance = answer
        if not before < position < tokens or not 1 <= distance <= position:
            return False
        before = position
    return True
