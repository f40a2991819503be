"""All that is wrong with a config, said at once."""

from __future__ import annotations

from dataclasses import dataclass

from megachiar.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config.

    Attributes:
        key: dotted path, such as ``model.num_layers``.
        message: what is wrong, with the value and the limit.
        remedy: what to change.
    """

    key: str
    message: str
    remedy: str


class ConfigError(UserError):
    """Every problem of a config, each with file (and line), key path, value, limit and remedy."""

    same_on_every_rank = True

    def __init__(self, source: str, located: list[tuple[str, Problem]]):
        self.source, self.located = source, located
        self.problems = [problem for _, problem in located]
        count = f"{len(located)} problem{'s' if len(located) != 1 else ''}"
        lines = [f"{place}: {p.key}: {p.message}\n    remedy: {p.remedy}" for place, p in located]
        super().__init__(source, f"{count}\n" + "\n".join(lines))

    def __reduce__(self):
        return type(self), (self.source, self.located)
