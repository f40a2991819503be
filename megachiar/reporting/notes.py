"""What a report leaves out, each with its reason in one line, for the console and for the page."""

from __future__ import annotations

from dataclasses import dataclass, field

from megachiar.errors import UserError


@dataclass
class Notes:
    """Lines about what is left out, in the order in which they were found, each of them once.

    Attributes:
        lines: of the console and of the page.
    """

    lines: list[str] = field(default_factory=list)

    def add(self, what: str, why: str | UserError) -> None:
        """Note that ``what`` is left out or is not as it should be, and why."""
        reason = f"{why.where}: {why.problem}" if isinstance(why, UserError) else why
        line = " ".join(f"{what}: {reason}".split())
        if line not in self.lines:
            self.lines.append(line)
