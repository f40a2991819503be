"""All files of a folder, also behind links, without going round in a loop of links."""

from __future__ import annotations

import os
from collections import deque
from typing import NamedTuple

from megachiar.errors import disk_errors


class LeftOut(NamedTuple):
    """A file or folder that is not read: its path, and why."""

    name: str
    reason: str


def walk(root: str, enters_hidden: bool = False) -> tuple[list[str], list[LeftOut]]:
    """The files of ``root`` and of all folders in it, and what is no file to be read.

    Links to folders are followed when all that is really there was seen; a folder is entered once, so that a link to
    one that was seen, or to one that holds it, is left out.

    Args:
        root: a folder.
        enters_hidden: take what begins with a dot too.

    Returns:
        Paths below ``root`` with ``/`` between their parts, sorted folder after folder; and what is left out.

    Raises:
        UserError: a folder cannot be read.
    """
    files: list[str] = []
    left_out: list[LeftOut] = []
    real: deque[str] = deque([""])
    links: deque[str] = deque()
    seen: set[tuple[int, int]] = set()
    while real or links:
        is_link = not real
        folder = (real or links).popleft()
        with disk_errors(os.path.join(root, folder), "read"):
            found = os.stat(os.path.join(root, folder))
            if (found.st_dev, found.st_ino) in seen or (is_link and _leads_up(root, folder)):
                left_out.append(LeftOut(folder.rstrip("/"), "a link to a folder that is read already or leads up"))
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = folder + entry.name
                    if entry.name.startswith(".") and not enters_hidden:
                        left_out.append(LeftOut(name, "hidden"))
                    elif _is_folder(entry):
                        (links if entry.is_symlink() else real).append(name + "/")
                    elif _is_file(entry):
                        files.append(name)
                    else:
                        broken = entry.is_symlink() and not os.path.exists(entry.path)
                        left_out.append(LeftOut(name, "a broken link" if broken else "not a file"))
        if not real:
            links = deque(sorted(links))
    files.sort(key=lambda name: name.split("/"))
    left_out.sort()
    return files, left_out


def _leads_up(root: str, link: str) -> bool:
    """Whether a link leads to a folder that ``root`` is in."""
    target = os.path.realpath(os.path.join(root, link))
    return os.path.commonpath([target, os.path.realpath(root)]) == target


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead to each other
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
