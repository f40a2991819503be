"""Number the classes of labelled documents: those that the caller names, or those that the inputs have, sorted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megachiar.errors import UserError

MOST_FOUND = 10_000
"""How many classes may be found in the inputs; more are surely no classes, but the number or text of each document."""
_NUMBER = re.compile(r"-?\d+")


def class_of(label: str | int, classes: Sequence[str] | None) -> str | None:
    """Return the name of the class that a label stands for; None if it is none of ``classes``.

    A label is the name of its class. A whole number is also a class's place, from 0, where no name is a number itself.

    Args:
        label: as it was read.
        classes: the names of the classes; None takes any label for the name of a class.
    """
    name = str(label)
    if classes is None or name in classes:
        return name
    if isinstance(label, int) and 0 <= label < len(classes) and not any(map(_NUMBER.fullmatch, classes)):
        return classes[label]
    return None


class ClassTable:
    """Number classes in the order in which they are found; their final numbers are known at the end.

    Attributes:
        found: the names in the order of their provisional numbers.

    Args:
        given: the names of all classes in the order of their final numbers; None takes those that are found, sorted.
        found: the names that an earlier run has found, in order.
    """

    def __init__(self, given: Sequence[str] | None, found: Iterable[str] = ()):
        self._given = given
        self.found = list(given if given is not None else found)
        self._numbers = {name: number for number, name in enumerate(self.found)}

    def numbers_of(self, names: Sequence[str]) -> NDArray[Any]:
        """Return the provisional number of the class of each document, int64 (documents,).

        Raises:
            UserError: more classes are found than there can be.
        """
        for name in names:
            if name not in self._numbers:
                self._numbers[name] = len(self.found)
                self.found.append(name)
        if self._given is None and len(self.found) > MOST_FOUND:
            examples = f"{self.found[0][:40]!r} and {self.found[-1][:40]!r}"
            raise UserError(
                "--label-key",
                f"there are more than {MOST_FOUND:,} labels, such as {examples}",
                "name the key of the class; where these are classes indeed, name them with --classes-from",
            )
        return np.array([self._numbers[name] for name in names], np.int64)

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes found so far in their final order: as given, or sorted.

        Whole numbers are sorted by size, and all else as text.
        """
        if self._given is not None:
            return list(self._given)
        numeric = all(map(_NUMBER.fullmatch, self.found))
        return sorted(self.found, key=lambda name: (int(name), name) if numeric else (0, name))

    def renumbering(self) -> NDArray[Any]:
        """Return the final number of each class, by its provisional number, int64 (classes,)."""
        final = {name: number for number, name in enumerate(self.classes)}
        return np.array([final[name] for name in self.found], np.int64)
