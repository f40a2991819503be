"""The commands of a section of a page, with the loops of bash written out."""

from __future__ import annotations

import re

from support import ROOT


def page_commands(page: str, heading: str) -> list[str]:
    """Return the commands of the blocks below a heading of ``docs/page``, up to the next heading, one a line."""
    section = re.split(r"^#+ ", (ROOT / "docs" / page).read_text().split(f"{heading}\n")[1], flags=re.M)
    # A comment within a block is no heading: no block of these sections has one.
    blocks = re.findall(r"^```bash\n(.*?)^```", section[0], re.M | re.S)
    return expanded("".join(blocks).replace("\\\n", " ").splitlines())


def expanded(lines: list[str]) -> list[str]:
    """Return the commands of lines of bash with nested loops, with the values of their variables."""
    found: list[str] = []
    loops: list[tuple[str, list[str]]] = []
    for line in map(str.strip, lines):
        if loop := re.fullmatch(r"for (\w+) in (.*); do", line):
            loops.append((loop[1], loop[2].split()))
        elif line == "done":
            loops.pop()
        else:
            variants = [line]
            for name, values in loops:
                variants = [text.replace(f"${name}", value) for text in variants for value in values]
            found += dict.fromkeys(variants)
    return [" ".join(command.split()) for command in found]
