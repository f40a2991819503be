"""The error that reports all problems of a config at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megachiar.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a config.

    Attributes:
        key: the dotted path, such as ``model.num_layers``.
        message: the problem, with the value and the limit.
        remedy: the change that the reader can make.
    """

    key: str
    message: str
    remedy: str


class ConfigError(UserError):
    """A config has problems; the message names each with file, line, key path, value, limit and remedy.

    Args:
        source: the name of the config.
        located: each problem with its location, which is a file and line or an override.
    """

    same_on_every_rank = True

    def __init__(self, source: str, located: list[tuple[str, Problem]]):
        self.source, self.located = source, located
        self.problems = [problem for _, problem in located]
        count = f"{len(located)} problem{'s' if len(located) != 1 else ''}"
        lines = [f"{location}: {p.key}: {p.message}\n    remedy: {p.remedy}" for location, p in located]
        super().__init__(source, f"{count}\n" + "\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.located)
